// The rows of a LayerNorm, shared by adaln and residual_adaln; included once for each instruction set.
//
//     h = (y - mean)·rstd·scale + shift      statistics in two passes over a row that lies in the first-level cache
//     g = rstd·(t - m1 - yhat·m2) [+ dy],    t = dh·scale, m1 = mean(t), m2 = mean(t·yhat)
//
// R rows at a time: each vector over the features is loaded once for R rows, and R sums run side by side.

namespace difffit::DF_ISA {

// `sum` holds the lane sums of the R rows of y. Writes h, mean and rstd.
template <int R, class Y, class H>
DF_INLINE void layer_norm_rows(const Y* y, const vf* sum, const float* scale, const float* shift, float eps, H* h,
                               float* mean, float* rstd, int64_t D) {
  vf m[R], q[R], square[R];
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
    q[r] = splat(rstd[r]);
  }
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf scale_d = load(scale + d, lanes), shift_d = load(shift + d, lanes);
    for (int r = 0; r < R; ++r) {
      store(h + r * D + d, (load(y + r * D + d, lanes) - m[r]) * q[r] * scale_d + shift_d, lanes);
    }
  });
}

// Backward of LayerNorm and, with Branch, of the residual sum before it. dy may be null: y has no other consumer then.
// Adds to the chunk's sums: dscale += dh·yhat, dshift += dh, and with Branch dgate += g·branch, dbias += g (before
// rounding).
template <int R, bool Branch, bool Dy, class X, class H>
DF_INLINE void layer_norm_backward_rows(const H* dh, const X* dy, const X* y, const H* branch, const float* gate,
                                        const float* scale, const float* mean, const float* rstd, X* dx, H* dbranch,
                                        float* dscale, float* dshift, float* dgate, float* dbias, int64_t D) {
  vf m[R], q[R], first[R], second[R];
  for (int r = 0; r < R; ++r) {
    m[r] = splat(mean[r]);
    q[r] = splat(rstd[r]);
    first[r] = second[r] = vf{};
  }
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf scale_d = load(scale + d, lanes);
    vf dscale_d = load(dscale + d, lanes), dshift_d = load(dshift + d, lanes);
    for (int r = 0; r < R; ++r) {
      const vf g = load(dh + r * D + d, lanes);
      const vf yhat = (load(y + r * D + d, lanes) - m[r]) * q[r];
      const vf t = g * scale_d;  // 0 behind the end of the row
      first[r] += t;
      second[r] += t * yhat;
      dscale_d += g * yhat;
      dshift_d += g;
    }
    store(dscale + d, dscale_d, lanes);
    store(dshift + d, dshift_d, lanes);
  });
  for (int r = 0; r < R; ++r) {
    first[r] = splat(fold_sum(first[r]) / static_cast<float>(D));
    second[r] = splat(fold_sum(second[r]) / static_cast<float>(D));
  }
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf scale_d = load(scale + d, lanes);
    vf gate_d = {}, dgate_d = {}, dbias_d = {};
    if constexpr (Branch) {
      gate_d = load(gate + d, lanes);
      dgate_d = load(dgate + d, lanes);
      dbias_d = load(dbias + d, lanes);
    }
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * D + d;
      const vf yhat = (load(y + at, lanes) - m[r]) * q[r];
      vf g = q[r] * (load(dh + at, lanes) * scale_d - first[r] - yhat * second[r]);
      if constexpr (Dy) g += load(dy + at, lanes);
      store(dx + at, g, lanes);
      if constexpr (Branch) {
        dgate_d += g * load(branch + at, lanes);
        dbias_d += g;
        store(dbranch + at, g * gate_d, lanes);
      }
    }
    if constexpr (Branch) {
      store(dgate + d, dgate_d, lanes);
      store(dbias + d, dbias_d, lanes);
    }
  });
}

}  // namespace difffit::DF_ISA
