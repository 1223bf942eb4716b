// Chunks of frozen_qkv.cpp; included once for each instruction set.

namespace difffit::DF_ISA {

template <int R, class T>
DF_INLINE void qkv_scale_rows(T* qkv, const float* gamma, const float* bias_q, int64_t D) {
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf gamma_d = load(gamma + d, lanes), bias_d = load(bias_q + d, lanes);
    for (int r = 0; r < R; ++r) {
      T* p = qkv + r * 3 * D + d;
      store(p, gamma_d * (load(p, lanes) + bias_d), lanes);
    }
  });
  each(2 * D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf gamma_d = load(gamma + D + d, lanes);
    for (int r = 0; r < R; ++r) {
      T* p = qkv + r * 3 * D + D + d;
      store(p, gamma_d * load(p, lanes), lanes);
    }
  });
}

template <class T>
DF_KERNEL void qkv_scale_chunk(T* qkv, const float* gamma, const float* bias_q, int64_t rows, int64_t D) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) qkv_scale_rows<4>(qkv + m * 3 * D, gamma, bias_q, D);
  for (; m < rows; ++m) qkv_scale_rows<1>(qkv + m * 3 * D, gamma, bias_q, D);
}

// dz = gamma·dy for one third of the columns, and its sums where they are wanted (not null): dy and dy·y.
template <int R, bool Sum, bool Dot, class T>
DF_INLINE void qkv_backward_third(const T* dy, const T* y, const float* gamma, T* dz, float* sum, float* dot, int64_t D) {
  each(D, [&](int64_t d, auto lanes) DF_LAMBDA {
    const vf gamma_d = load(gamma + d, lanes);
    vf total = {}, product = {};
    if constexpr (Sum) total = load(sum + d, lanes);
    if constexpr (Dot) product = load(dot + d, lanes);
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * 3 * D + d;
      const vf g = load(dy + at, lanes);
      if constexpr (Sum) total += g;
      if constexpr (Dot) product += g * load(y + at, lanes);
      store(dz + at, g * gamma_d, lanes);
    }
    if constexpr (Sum) store(sum + d, total, lanes);
    if constexpr (Dot) store(dot + d, product, lanes);
  });
}

template <int R, class T>
DF_INLINE void qkv_backward_rows(const T* dy, const T* y, const float* gamma, T* dz, float* sums, int64_t D) {
  qkv_backward_third<R, true, true>(dy, y, gamma, dz, sums, sums + D, D);
  qkv_backward_third<R, false, false>(dy + D, y + D, gamma + D, dz + D, sums, sums, D);
  qkv_backward_third<R, false, true>(dy + 2 * D, y + 2 * D, gamma + 2 * D, dz + 2 * D, sums, sums + 2 * D, D);
}

// sums: dq, dq·q, dv·v.
template <class T>
DF_KERNEL void qkv_backward_chunk(const T* dy, const T* y, const float* gamma, T* dz, float* sums, int64_t rows,
                                  int64_t D) {
  std::memset(sums, 0, 3 * D * sizeof(float));
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) qkv_backward_rows<4>(dy + m * 3 * D, y + m * 3 * D, gamma, dz + m * 3 * D, sums, D);
  for (; m < rows; ++m) qkv_backward_rows<1>(dy + m * 3 * D, y + m * 3 * D, gamma, dz + m * 3 * D, sums, D);
}

}  // namespace difffit::DF_ISA
