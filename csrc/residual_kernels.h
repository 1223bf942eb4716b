// Chunks of residual.cpp; included once for each instruction set.
#include "layernorm.h"

namespace difffit::DF_ISA {

template <int R, class X, class H>
DF_INLINE void residual_forward_rows(const X* x, const H* branch, const float* gate, const float* bias, X* y,
                                     int64_t D) {
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf gate_d = load(gate + d, lanes), bias_d = load(bias + d, lanes);
    for (int i = 0; i < R; ++i) {
      const int64_t at = i * D + d;
      store(y + at, load(x + at, lanes) + gate_d * load(branch + at, lanes) + bias_d, lanes);
    }
  });
}

template <class X, class H>
DF_KERNEL void residual_forward_chunk(const X* x, const H* branch, const float* gate, const float* bias, X* y,
                                      int64_t rows, int64_t D) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) residual_forward_rows<4>(x + t * D, branch + t * D, gate, bias, y + t * D, D);
  for (; t < rows; ++t) residual_forward_rows<1>(x + t * D, branch + t * D, gate, bias, y + t * D, D);
}

template <int R, class X, class H>
DF_INLINE void residual_backward_rows(const X* dy, const H* branch, const float* gate, H* dbranch, float* dgate,
                                      float* dbias, int64_t D) {
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf gate_d = load(gate + d, lanes);
    vf dgate_d = load(dgate + d, lanes), dbias_d = load(dbias + d, lanes);
    for (int i = 0; i < R; ++i) {
      const int64_t at = i * D + d;
      const vf g = load(dy + at, lanes);
      dgate_d += g * load(branch + at, lanes);
      dbias_d += g;
      store(dbranch + at, g * gate_d, lanes);
    }
    store(dgate + d, dgate_d, lanes);
    store(dbias + d, dbias_d, lanes);
  });
}

// sums: dgate, dbias.
template <class X, class H>
DF_KERNEL void residual_backward_chunk(const X* dy, const H* branch, const float* gate, H* dbranch, float* sums,
                                       int64_t rows, int64_t D) {
  std::memset(sums, 0, 2 * D * sizeof(float));
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4)
    residual_backward_rows<4>(dy + t * D, branch + t * D, gate, dbranch + t * D, sums, sums + D, D);
  for (; t < rows; ++t) residual_backward_rows<1>(dy + t * D, branch + t * D, gate, dbranch + t * D, sums, sums + D, D);
}

template <int R, class X, class H>
DF_INLINE void residual_adaln_forward_rows(const X* x, const H* branch, const float* gate, const float* bias,
                                           const float* scale, const float* shift, float eps, X* y, H* h, float* mean,
                                           float* rstd, int64_t D) {
  vf sum[R];
  for (int i = 0; i < R; ++i) sum[i] = vf{};
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf gate_d = load(gate + d, lanes), bias_d = load(bias + d, lanes);
    for (int i = 0; i < R; ++i) {
      const int64_t at = i * D + d;
      // Behind the end of the row all of them are 0.
      sum[i] += store(y + at, load(x + at, lanes) + gate_d * load(branch + at, lanes) + bias_d, lanes);
    }
  });
  layer_norm_rows<R>(y, sum, scale, shift, eps, h, mean, rstd, D);
}

template <class X, class H>
DF_KERNEL void residual_adaln_forward_chunk(const X* x, const H* branch, const float* gate, const float* bias,
                                            const float* scale, const float* shift, float eps, X* y, H* h, float* mean,
                                            float* rstd, int64_t rows, int64_t D) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) {
    residual_adaln_forward_rows<4>(x + t * D, branch + t * D, gate, bias, scale, shift, eps, y + t * D, h + t * D,
                                   mean + t, rstd + t, D);
  }
  for (; t < rows; ++t) {
    residual_adaln_forward_rows<1>(x + t * D, branch + t * D, gate, bias, scale, shift, eps, y + t * D, h + t * D,
                                   mean + t, rstd + t, D);
  }
}

// sums: dgate, dbias, dscale, dshift.
template <bool Dy, class X, class H>
DF_KERNEL void residual_adaln_backward_chunk(const H* dh, const X* dy, const X* y, const H* branch, const float* gate,
                                             const float* scale, const float* mean, const float* rstd, X* dx,
                                             H* dbranch, float* sums, int64_t rows, int64_t D) {
  std::memset(sums, 0, 4 * D * sizeof(float));
  float *dgate = sums, *dbias = sums + D, *dscale = sums + 2 * D, *dshift = sums + 3 * D;
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) {
    layer_norm_backward_rows<4, true, Dy>(dh + t * D, Dy ? dy + t * D : nullptr, y + t * D, branch + t * D, gate, scale,
                                          mean + t, rstd + t, dx + t * D, dbranch + t * D, dscale, dshift, dgate, dbias,
                                          D);
  }
  for (; t < rows; ++t) {
    layer_norm_backward_rows<1, true, Dy>(dh + t * D, Dy ? dy + t * D : nullptr, y + t * D, branch + t * D, gate, scale,
                                          mean + t, rstd + t, dx + t * D, dbranch + t * D, dscale, dshift, dgate, dbias,
                                          D);
  }
}

}  // namespace difffit::DF_ISA
