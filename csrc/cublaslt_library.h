// cuBLASLt without linking against it: the library that PyTorch has loaded is found by name at run time, and its
// functions by symbol. So building needs neither its header nor its import library, a build serves CUDA 12 and 13, and
// a machine without it gets a reason instead of a library that does not load. The environment variable
// DIFFFIT_FAST_CUBLASLT_LIBRARY names another file to use.
//
// Plain C++: descriptors can be made and read back on a machine without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cublaslt_host.h"

namespace difffit::cublaslt {

struct HeuristicResult {  // cublasLtMatmulHeuristicResult_t
  Algo algo;
  size_t workspace;
  int32_t state;
  float waves;
  int32_t reserved[4];
};

// The C functions, by the prototypes of cublasLt.h with its opaque pointers as void*. All return cublasStatus_t.
struct Library {
  size_t (*version)();
  int (*matmul)(void* handle, void* desc, const void* alpha, const void* A, void* Adesc, const void* B, void* Bdesc,
                const void* beta, const void* C, void* Cdesc, void* D, void* Ddesc, const Algo* algo, void* workspace,
                size_t workspace_bytes, void* stream);
  int (*heuristic)(void* handle, void* desc, void* Adesc, void* Bdesc, void* Cdesc, void* Ddesc, void* preference,
                   int requested, HeuristicResult* results, int* returned);
  int (*desc_create)(void** desc, int compute_type, int scale_type);
  int (*desc_destroy)(void* desc);
  int (*desc_set)(void* desc, int attribute, const void* value, size_t bytes);
  int (*desc_get)(void* desc, int attribute, void* value, size_t bytes, size_t* written);
  int (*layout_create)(void** layout, int type, uint64_t rows, uint64_t cols, int64_t ld);
  int (*layout_destroy)(void* layout);
  int (*layout_get)(void* layout, int attribute, void* value, size_t bytes, size_t* written);
  int (*preference_create)(void** preference);
  int (*preference_destroy)(void* preference);
  int (*preference_set)(void* preference, int attribute, const void* value, size_t bytes);
};

// The functions, looked up once; throws std::runtime_error with what was tried when there is no usable cuBLASLt.
const Library& library();

std::string status_text(int status);

// The addresses a call works on. `aux` and `bias` are read or written as the epilogue says.
struct Buffers {
  const void* a;
  const void* b;
  void* d;
  void* aux;
  void* bias;
};

// The descriptors of one call, made from its plan.
class Matmul {
 public:
  Matmul(const Plan& plan, const Buffers& buffers);
  ~Matmul();
  Matmul(const Matmul&) = delete;
  Matmul& operator=(const Matmul&) = delete;

  // Algorithms that fit the problem, the workspace and the alignment, best guess first; empty when there are none.
  std::vector<Candidate> candidates(void* handle, int64_t workspace_bytes, int64_t alignment, int count) const;

  // Enqueues the product; returns the status.
  int run(void* handle, const Candidate& candidate, void* workspace, int64_t workspace_bytes, void* stream) const;

  // What the library has stored in the descriptors, as JSON: for tests.
  std::string json() const;

 private:
  void release();

  Plan plan_;
  Buffers buffers_;
  void *desc_ = nullptr, *a_ = nullptr, *b_ = nullptr, *d_ = nullptr;
};

}  // namespace difffit::cublaslt
