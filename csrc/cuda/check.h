// Checks of the CUDA operations: what was expected and what came.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#if __has_include(<torch/csrc/stable/macros.h>)
#include <torch/csrc/stable/macros.h>
#endif

#include <initializer_list>
#include <stdexcept>
#include <string>

// Not every PyTorch from 2.10 on hands these on where one looks for them.
#ifndef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call)                                                                          \
  do {                                                                                                \
    const cudaError_t difffit_error = (call);                                                         \
    if (difffit_error != cudaSuccess) {                                                               \
      throw std::runtime_error(std::string(#call ": CUDA error: ") + cudaGetErrorString(difffit_error)); \
    }                                                                                                 \
  } while (0)
#endif
#ifndef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK() STD_CUDA_CHECK(cudaGetLastError())
#endif

namespace difffit::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& t) {
  std::string out = "(";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + ")";
}

inline std::string place(const Tensor& t) {
  return t.is_cuda() ? "CUDA device " + std::to_string(t.get_device_index()) : "another kind of device";
}

// A CUDA tensor of this shape and dtype, contiguous, on the device of `like`.
inline void check(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                  ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda(), op, ": ", name, " must be a CUDA tensor");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), op, ": ", name, " must be on ", place(like),
                  " like the first tensor; got ", place(t));
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have dtype ", torch::headeronly::toString(dtype),
                  "; got ", torch::headeronly::toString(t.scalar_type()));
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  std::string expected = "(";
  int64_t i = 0;
  for (int64_t size : sizes) {
    same = same && t.size(i) == size;
    expected += (i++ ? ", " : "") + std::to_string(size);
  }
  STD_TORCH_CHECK(same, op, ": ", name, " must have shape ", expected + ")", "; got ", shape(t));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda(), op, ": ", name, " must be a CUDA tensor");
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must have 2 dimensions; got shape ", shape(t));
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace difffit::cuda
