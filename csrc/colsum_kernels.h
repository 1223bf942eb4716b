// Chunks of colsum.cpp; included once for each instruction set. `stride` is the distance of two rows.

namespace difffit::DF_ISA {

template <int R, class T>
DF_INLINE void colsum_rows(const T* x, int64_t stride, float* sum, int64_t N) {
  each(N, [&](int64_t n, auto lanes) DF_LAMBDA {
    vf total = load(x + n, lanes);
    for (int r = 1; r < R; ++r) total += load(x + r * stride + n, lanes);
    store(sum + n, load(sum + n, lanes) + total, lanes);
  });
}

template <class T>
DF_KERNEL void colsum_chunk(const T* x, int64_t stride, float* sum, int64_t rows, int64_t N) {
  std::memset(sum, 0, N * sizeof(float));
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8) colsum_rows<8>(x + m * stride, stride, sum, N);
  for (; m < rows; ++m) colsum_rows<1>(x + m * stride, stride, sum, N);
}

}  // namespace difffit::DF_ISA
