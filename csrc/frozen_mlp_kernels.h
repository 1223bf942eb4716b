// Chunks of frozen_mlp.cpp; included once for each instruction set.
//
// With z = sqrt(2/pi)·(u + 0.044715·u³), (1 + tanh z)/2 is the logistic function of 2z: one exp and one division.
// Beyond |u| = 9.5 its value and its complement are below 1e-33; u is held there, so nothing overflows.
#include "elementary.h"

namespace difffit::DF_ISA {

constexpr float kGeluBound = 9.5f;
constexpr float kScale = 1.5957691216f;  // 2·sqrt(2/pi)
constexpr float kCubic = 0.044715f;

template <class T>
DF_KERNEL void gelu_forward_chunk(const T* u, T* g, int64_t n) {
  each(n, [&](int64_t i, auto lanes) DF_LAMBDA {
    const vf x = max_or(splat(-kGeluBound), load(u + i, lanes));
    const vf b = min_or(splat(kGeluBound), x);
    const vf e = exp_bounded(b * (b * b * (-kScale * kCubic) - kScale));
    store(g + i, x / (e + 1.0f), lanes);
  });
}

// gelu'(u) = p + u·p·(1 - p)·2z', p the logistic function of 2z.
DF_INLINE vf gelu_slope(vf u) {
  const vf b = min_or(splat(kGeluBound), max_or(splat(-kGeluBound), u));
  const vf square = b * b;
  const vf e = exp_bounded(b * (square * (-kScale * kCubic) - kScale));
  const vf p = 1.0f / (e + 1.0f);
  const vf slope = b * (square * (3.0f * kScale * kCubic) + kScale);
  return p + p * (p * e) * slope;
}

template <int R, class T>
DF_INLINE void gelu_backward_rows(const T* dg, const T* u, T* du, float* db, int64_t N) {
  each(N, [&](int64_t n, auto lanes) DF_LAMBDA {
    vf sum = load(db + n, lanes);
    for (int r = 0; r < R; ++r) {
      const vf d = load(dg + r * N + n, lanes) * gelu_slope(load(u + r * N + n, lanes));
      store(du + r * N + n, d, lanes);
      sum += d;
    }
    store(db + n, sum, lanes);
  });
}

template <class T>
DF_KERNEL void gelu_backward_chunk(const T* dg, const T* u, T* du, float* db, int64_t rows, int64_t N) {
  std::memset(db, 0, N * sizeof(float));
  int64_t m = 0;
  for (; m + 2 <= rows; m += 2) gelu_backward_rows<2>(dg + m * N, u + m * N, du + m * N, db, N);
  for (; m < rows; ++m) gelu_backward_rows<1>(dg + m * N, u + m * N, du + m * N, db, N);
}

}  // namespace difffit::DF_ISA
