// What one thread and one block of the CUDA column sum do, apart from where the data lies and how threads meet.
// Compiled by nvcc for the kernel and by the C++ compiler for its test on the CPU (cuda_emulation.cpp).
//
// A block owns 32·V columns and a chunk of rows: lane l of every warp owns columns l·V … l·V + V − 1, warp w the rows
// w, w + 8, w + 16, … of the chunk. Each thread keeps V float sums in registers; the 8 warps' sums are added in their
// order. The second kernel adds the chunks the same way: row w, w + 8, … of the partial sums, then the 8 warps.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DIFFFIT_HD __host__ __device__ __forceinline__
#else
#define DIFFFIT_HD inline
#endif
#ifdef __CUDA_ARCH__
#define DIFFFIT_UNROLL _Pragma("unroll")
#else
#define DIFFFIT_UNROLL
#endif

namespace difffit::colsum_cuda {

constexpr int kLanes = 32;       // threads side by side
constexpr int kWarps = 8;        // threads above each other
constexpr int kInFlight = 4;     // rows a thread loads before it adds the first
constexpr int64_t kMaxChunks = 128;
constexpr int64_t kMinChunkRows = 32;

struct Cut {
  int64_t chunk_rows, chunks;
};

// Depends on the number of rows alone, so that every device adds in the same order.
DIFFFIT_HD Cut cut_rows(int64_t rows) {
  int64_t chunk_rows = (rows + kMaxChunks - 1) / kMaxChunks;
  chunk_rows = (chunk_rows + kMinChunkRows - 1) / kMinChunkRows * kMinChunkRows;
  if (chunk_rows < kMinChunkRows) chunk_rows = kMinChunkRows;
  return {chunk_rows, (rows + chunk_rows - 1) / chunk_rows};
}

// sums[V] += the V columns that start at `x` of rows first, first + 8, … below `end`; `stride` elements between rows.
// Load(pointer, values): the V elements there as float.
template <int V, class T, class Load>
DIFFFIT_HD void add_rows(const T* x, int64_t stride, int64_t first, int64_t end, float* sums, Load load) {
  int64_t row = first;
  for (; row + (kInFlight - 1) * kWarps < end; row += kInFlight * kWarps) {
    float values[kInFlight][V];
    DIFFFIT_UNROLL
    for (int i = 0; i < kInFlight; ++i) load(x + (row + i * kWarps) * stride, values[i]);
    DIFFFIT_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      DIFFFIT_UNROLL
      for (int v = 0; v < V; ++v) sums[v] += values[i][v];
    }
  }
  for (; row < end; row += kWarps) {
    float values[V];
    load(x + row * stride, values);
    DIFFFIT_UNROLL
    for (int v = 0; v < V; ++v) sums[v] += values[v];
  }
}

// The sum of one column over the warps, in their order; `shared` holds [kWarps][columns].
DIFFFIT_HD float add_warps(const float* shared, int columns, int column) {
  float sum = shared[column];
  DIFFFIT_UNROLL
  for (int w = 1; w < kWarps; ++w) sum += shared[w * columns + column];
  return sum;
}

}  // namespace difffit::colsum_cuda
