// The rows of a LayerNorm, shared by adaln and residual_adaln; included once for each instruction set.
//
//     h = (y - mean)·rstd·a + c              statistics in two passes over a row that lies in the first-level cache
//     g = rstd·(t - m1 - yhat·m2) [+ dy],    t = dh·a, m1 = mean(t), m2 = mean(t·yhat)
//
// R rows at a time: each vector over the features is loaded once for R rows, and R sums run side by side.

namespace difffit::DF_ISA {

// `sum` holds the lane sums of the R rows of y. Writes h, mean and rstd.
template <int R, class Y, class H>
DF_INLINE void layer_norm_rows(const Y* y, const vf* sum, const float* a, const float* c, float eps, H* h, float* mean,
                               float* rstd, int64_t D) {
  vf m[R], s[R], square[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = fold_sum(sum[r]) / static_cast<float>(D);
    m[r] = splat(mean[r]);
    square[r] = vf{};
  }
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    for (int r = 0; r < R; ++r) {
      const vf v = keep(load(y + r * D + d, lanes) - m[r], lanes);
      square[r] += v * v;
    }
  });
  for (int r = 0; r < R; ++r) {
    rstd[r] = 1.0f / __builtin_sqrtf(fold_sum(square[r]) / static_cast<float>(D) + eps);
    s[r] = splat(rstd[r]);
  }
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf scale = load(a + d, lanes), shift = load(c + d, lanes);
    for (int r = 0; r < R; ++r) {
      store(h + r * D + d, (load(y + r * D + d, lanes) - m[r]) * s[r] * scale + shift, lanes);
    }
  });
}

// Backward of LayerNorm and, with Branch, of the residual sum before it. dy may be null: y has no other consumer then.
// Adds to the chunk's sums: da += dh·yhat, dc += dh, and with Branch ds += g·f, dr += g (before rounding).
template <int R, bool Branch, bool Dy, class X, class H>
DF_INLINE void layer_norm_backward_rows(const H* dh, const X* dy, const X* y, const H* f, const float* s, const float* a,
                                        const float* mean, const float* rstd, X* dx, H* df, float* da, float* dc,
                                        float* ds, float* dr, int64_t D) {
  vf m[R], q[R], first[R], second[R];
  for (int r = 0; r < R; ++r) {
    m[r] = splat(mean[r]);
    q[r] = splat(rstd[r]);
    first[r] = second[r] = vf{};
  }
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf scale = load(a + d, lanes);
    vf sum_a = load(da + d, lanes), sum_c = load(dc + d, lanes);
    for (int r = 0; r < R; ++r) {
      const vf g = load(dh + r * D + d, lanes);
      const vf yhat = (load(y + r * D + d, lanes) - m[r]) * q[r];
      const vf t = g * scale;  // 0 behind the end of the row
      first[r] += t;
      second[r] += t * yhat;
      sum_a += g * yhat;
      sum_c += g;
    }
    store(da + d, sum_a, lanes);
    store(dc + d, sum_c, lanes);
  });
  for (int r = 0; r < R; ++r) {
    first[r] = splat(fold_sum(first[r]) / static_cast<float>(D));
    second[r] = splat(fold_sum(second[r]) / static_cast<float>(D));
  }
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf scale = load(a + d, lanes);
    vf gate = {}, sum_s = {}, sum_r = {};
    if constexpr (Branch) {
      gate = load(s + d, lanes);
      sum_s = load(ds + d, lanes);
      sum_r = load(dr + d, lanes);
    }
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * D + d;
      const vf yhat = (load(y + at, lanes) - m[r]) * q[r];
      vf g = q[r] * (load(dh + at, lanes) * scale - first[r] - yhat * second[r]);
      if constexpr (Dy) g += load(dy + at, lanes);
      store(dx + at, g, lanes);
      if constexpr (Branch) {
        sum_s += g * load(f + at, lanes);
        sum_r += g;
        store(df + at, g * gate, lanes);
      }
    }
    if constexpr (Branch) {
      store(ds + d, sum_s, lanes);
      store(dr + d, sum_r, lanes);
    }
  });
}

}  // namespace difffit::DF_ISA
