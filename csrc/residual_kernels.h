// Chunks of residual.cpp; included once for each instruction set.
#include "layernorm.h"

namespace difffit::DF_ISA {

template <int R, class X, class H>
DF_INLINE void residual_forward_rows(const X* x, const H* f, const float* s, const float* r, X* y, int64_t D) {
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf gate = load(s + d, lanes), bias = load(r + d, lanes);
    for (int i = 0; i < R; ++i) {
      const int64_t at = i * D + d;
      store(y + at, load(x + at, lanes) + gate * load(f + at, lanes) + bias, lanes);
    }
  });
}

template <class X, class H>
DF_KERNEL void residual_forward_chunk(const X* x, const H* f, const float* s, const float* r, X* y, int64_t rows,
                                      int64_t D) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) residual_forward_rows<4>(x + t * D, f + t * D, s, r, y + t * D, D);
  for (; t < rows; ++t) residual_forward_rows<1>(x + t * D, f + t * D, s, r, y + t * D, D);
}

template <int R, class X, class H>
DF_INLINE void residual_backward_rows(const X* dy, const H* f, const float* s, H* df, float* ds, float* dr, int64_t D) {
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf gate = load(s + d, lanes);
    vf sum_s = load(ds + d, lanes), sum_r = load(dr + d, lanes);
    for (int i = 0; i < R; ++i) {
      const int64_t at = i * D + d;
      const vf g = load(dy + at, lanes);
      sum_s += g * load(f + at, lanes);
      sum_r += g;
      store(df + at, g * gate, lanes);
    }
    store(ds + d, sum_s, lanes);
    store(dr + d, sum_r, lanes);
  });
}

// sums: ds, dr.
template <class X, class H>
DF_KERNEL void residual_backward_chunk(const X* dy, const H* f, const float* s, H* df, float* sums, int64_t rows,
                                       int64_t D) {
  std::memset(sums, 0, 2 * D * sizeof(float));
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) residual_backward_rows<4>(dy + t * D, f + t * D, s, df + t * D, sums, sums + D, D);
  for (; t < rows; ++t) residual_backward_rows<1>(dy + t * D, f + t * D, s, df + t * D, sums, sums + D, D);
}

template <int R, class X, class H>
DF_INLINE void residual_adaln_forward_rows(const X* x, const H* f, const float* s, const float* r, const float* a,
                                           const float* c, float eps, X* y, H* h, float* mean, float* rstd, int64_t D) {
  vf sum[R];
  for (int i = 0; i < R; ++i) sum[i] = vf{};
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf gate = load(s + d, lanes), bias = load(r + d, lanes);
    for (int i = 0; i < R; ++i) {
      const int64_t at = i * D + d;
      // Behind the end of the row all of them are 0.
      sum[i] += store(y + at, load(x + at, lanes) + gate * load(f + at, lanes) + bias, lanes);
    }
  });
  layer_norm_rows<R>(y, sum, a, c, eps, h, mean, rstd, D);
}

template <class X, class H>
DF_KERNEL void residual_adaln_forward_chunk(const X* x, const H* f, const float* s, const float* r, const float* a,
                                            const float* c, float eps, X* y, H* h, float* mean, float* rstd,
                                            int64_t rows, int64_t D) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) {
    residual_adaln_forward_rows<4>(x + t * D, f + t * D, s, r, a, c, eps, y + t * D, h + t * D, mean + t, rstd + t, D);
  }
  for (; t < rows; ++t) {
    residual_adaln_forward_rows<1>(x + t * D, f + t * D, s, r, a, c, eps, y + t * D, h + t * D, mean + t, rstd + t, D);
  }
}

// sums: ds, dr, da, dc.
template <bool Dy, class X, class H>
DF_KERNEL void residual_adaln_backward_chunk(const H* dh, const X* dy, const X* y, const H* f, const float* s,
                                             const float* a, const float* mean, const float* rstd, X* dx, H* df,
                                             float* sums, int64_t rows, int64_t D) {
  std::memset(sums, 0, 4 * D * sizeof(float));
  float *ds = sums, *dr = sums + D, *da = sums + 2 * D, *dc = sums + 3 * D;
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) {
    layer_norm_backward_rows<4, true, Dy>(dh + t * D, Dy ? dy + t * D : nullptr, y + t * D, f + t * D, s, a, mean + t,
                                          rstd + t, dx + t * D, df + t * D, da, dc, ds, dr, D);
  }
  for (; t < rows; ++t) {
    layer_norm_backward_rows<1, true, Dy>(dh + t * D, Dy ? dy + t * D : nullptr, y + t * D, f + t * D, s, a, mean + t,
                                          rstd + t, dx + t * D, df + t * D, da, dc, ds, dr, D);
  }
}

}  // namespace difffit::DF_ISA
