// Chunks of adaln.cpp; included once for each instruction set.
#include "layernorm.h"

namespace difffit::DF_ISA {

template <int R, class X, class H>
DF_INLINE void adaln_forward_rows(const X* x, const float* scale, const float* shift, float eps, H* h, float* mean,
                                  float* rstd, int64_t D) {
  vf sum[R];
  for (int r = 0; r < R; ++r) sum[r] = vf{};
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    for (int r = 0; r < R; ++r) sum[r] += load(x + r * D + d, lanes);
  });
  layer_norm_rows<R>(x, sum, scale, shift, eps, h, mean, rstd, D);
}

template <class X, class H>
DF_KERNEL void adaln_forward_chunk(const X* x, const float* scale, const float* shift, float eps, H* h, float* mean,
                                   float* rstd, int64_t rows, int64_t D) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) adaln_forward_rows<4>(x + t * D, scale, shift, eps, h + t * D, mean + t, rstd + t, D);
  for (; t < rows; ++t) adaln_forward_rows<1>(x + t * D, scale, shift, eps, h + t * D, mean + t, rstd + t, D);
}

// sums: dscale, dshift.
template <class X, class H>
DF_KERNEL void adaln_backward_chunk(const H* dh, const X* x, const float* scale, const float* mean, const float* rstd,
                                    X* dx, float* sums, int64_t rows, int64_t D) {
  std::memset(sums, 0, 2 * D * sizeof(float));
  const X* no_dy = nullptr;
  const H* no_branch = nullptr;
  H* no_dbranch = nullptr;
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) {
    layer_norm_backward_rows<4, false, false>(dh + t * D, no_dy, x + t * D, no_branch, scale, scale, mean + t, rstd + t,
                                              dx + t * D, no_dbranch, sums, sums + D, sums, sums, D);
  }
  for (; t < rows; ++t) {
    layer_norm_backward_rows<1, false, false>(dh + t * D, no_dy, x + t * D, no_branch, scale, scale, mean + t, rstd + t,
                                              dx + t * D, no_dbranch, sums, sums + D, sums, sums, D);
  }
}

}  // namespace difffit::DF_ISA
