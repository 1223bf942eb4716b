// colsum: out_n = Σ_m x_mn in float32, the CUDA C++ alternative to the Triton kernel of the same name.
//
// Two stages without atomics (colsum_device.h says who owns what). Bytes: reads x once, in 16-byte loads, four in
// flight per thread; writes and reads at most 128 partial rows of N floats. x may be a column range of a wider matrix
// (unit column stride). Where its rows are not aligned to 16 bytes, elements are loaded one by one.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.h"
#include "colsum_device.h"

namespace difffit::colsum_cuda {
namespace {

using cuda::ScalarType;
using cuda::Tensor;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// V consecutive elements as float: one 16-byte load, or a single element.
template <class T, int V>
__device__ __forceinline__ void load(const T* from, float* values) {
  if constexpr (V == 1) {
    values[0] = widen(*from);
  } else {
    static_assert(V * sizeof(T) == 16);
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    T elements[V];
    memcpy(elements, &bits, sizeof(bits));
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = widen(elements[v]);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kLanes* kWarps)
    sum_chunks(const T* __restrict__ x, int64_t stride, int64_t rows, int64_t columns, int64_t chunk_rows,
               float* __restrict__ out) {
  __shared__ float shared[kWarps][kLanes * V];
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * (kLanes * V);
  const int64_t column = first_column + lane * V;
  const int64_t first = blockIdx.y * chunk_rows;
  const int64_t end = first + chunk_rows < rows ? first + chunk_rows : rows;
  float sums[V] = {};
  if (column < columns) {  // V divides the number of columns
    add_rows<V>(x + column, stride, first + warp, end, sums,
                [](const T* from, float* values) { load<T, V>(from, values); });
  }
#pragma unroll
  for (int v = 0; v < V; ++v) shared[warp][lane * V + v] = sums[v];
  __syncthreads();
  for (int c = warp * kLanes + lane; c < kLanes * V; c += kLanes * kWarps) {
    if (first_column + c < columns) {
      out[blockIdx.y * columns + first_column + c] = add_warps(&shared[0][0], kLanes * V, c);
    }
  }
}

template <class T, int V>
void launch(const void* x, int64_t stride, int64_t rows, int64_t columns, Cut cut, float* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((columns + kLanes * V - 1) / (kLanes * V)), static_cast<unsigned>(cut.chunks));
  sum_chunks<T, V><<<grid, dim3(kLanes, kWarps), 0, stream>>>(static_cast<const T*>(x), stride, rows, columns,
                                                             cut.chunk_rows, out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void sum(const Tensor& x, float* partial, Cut cut, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const int64_t rows = x.size(0), columns = x.size(1), stride = x.stride(0);
  const void* data = x.const_data_ptr();
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % V == 0 && columns % V == 0;
  (aligned ? launch<T, V> : launch<T, 1>)(data, stride, rows, columns, cut, partial, stream);
}

Tensor colsum(const Tensor& x) {
  const char* op = "colsum";
  cuda::check_matrix(op, "x", x);
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
                  ": x must be float32, bfloat16 or float16; got ", torch::headeronly::toString(type));
  if (rows == 0 || columns == 0) return cuda::zeros(x, {columns}, ScalarType::Float);
  STD_TORCH_CHECK(columns == 1 || x.stride(1) == 1, op, ": the columns of x must be adjacent in memory; got stride ",
                  x.stride(1));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = cuda::current_stream(x);
  const Cut cut = cut_rows(rows);
  Tensor out = cuda::empty(x, {columns}, ScalarType::Float);
  Tensor partial = cut.chunks == 1 ? out : cuda::empty(x, {cut.chunks, columns}, ScalarType::Float);
  auto* p = static_cast<float*>(partial.mutable_data_ptr());
  if (type == ScalarType::Float) {
    sum<float>(x, p, cut, stream);
  } else if (type == ScalarType::BFloat16) {
    sum<__nv_bfloat16>(x, p, cut, stream);
  } else {
    sum<__half>(x, p, cut, stream);
  }
  if (cut.chunks > 1) {  // the partial sums are one chunk of at most 128 rows
    launch<float, 1>(p, columns, cut.chunks, columns, Cut{cut.chunks, 1}, static_cast<float*>(out.mutable_data_ptr()),
                     stream);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cuda, m) { m.def("colsum(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cuda, CUDA, m) { m.impl("colsum", TORCH_BOX(&colsum)); }

}  // namespace difffit::colsum_cuda
