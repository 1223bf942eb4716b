#include "cublaslt_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace difffit::cublaslt {
namespace {

constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

void* open_library() {
  if (const char* path = std::getenv("DIFFFIT_FAST_CUBLASLT_LIBRARY"); path != nullptr && *path != '\0') {
    if (void* found = dlopen(path, RTLD_NOW)) return found;
    throw std::runtime_error(std::string("DIFFFIT_FAST_CUBLASLT_LIBRARY cannot be loaded: ") + dlerror());
  }
  for (const char* file : kNames) {  // the one that PyTorch uses comes first, whichever it is
    if (void* found = dlopen(file, RTLD_NOW | RTLD_NOLOAD)) return found;
  }
  std::string tried;
  for (const char* file : kNames) {
    if (void* found = dlopen(file, RTLD_NOW)) return found;
    tried += tried.empty() ? file : std::string(" and ") + file;
  }
  throw std::runtime_error("cuBLASLt is not there: tried " + tried + ", which PyTorch with CUDA loads");
}

template <class F>
void resolve(void* from, const char* symbol, F& function) {
  void* found = dlsym(from, symbol);
  if (found == nullptr) throw std::runtime_error(std::string("the cuBLASLt that is loaded lacks ") + symbol);
  function = reinterpret_cast<F>(found);
}

Library load() {
  void* from = open_library();
  Library lib{};
  resolve(from, "cublasLtGetVersion", lib.version);
  resolve(from, "cublasLtMatmul", lib.matmul);
  resolve(from, "cublasLtMatmulAlgoGetHeuristic", lib.heuristic);
  resolve(from, "cublasLtMatmulDescCreate", lib.desc_create);
  resolve(from, "cublasLtMatmulDescDestroy", lib.desc_destroy);
  resolve(from, "cublasLtMatmulDescSetAttribute", lib.desc_set);
  resolve(from, "cublasLtMatmulDescGetAttribute", lib.desc_get);
  resolve(from, "cublasLtMatrixLayoutCreate", lib.layout_create);
  resolve(from, "cublasLtMatrixLayoutDestroy", lib.layout_destroy);
  resolve(from, "cublasLtMatrixLayoutGetAttribute", lib.layout_get);
  resolve(from, "cublasLtMatmulPreferenceCreate", lib.preference_create);
  resolve(from, "cublasLtMatmulPreferenceDestroy", lib.preference_destroy);
  resolve(from, "cublasLtMatmulPreferenceSetAttribute", lib.preference_set);
  return lib;
}

int32_t data_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return kR16BF;
    case Dtype::fp16: return kR16F;
    default: return kR32F;
  }
}

void succeed(int status, const char* call) {
  if (status != 0) throw std::runtime_error(std::string(call) + " failed: " + status_text(status));
}

class Preference {
 public:
  Preference() { succeed(library().preference_create(&pointer_), "cublasLtMatmulPreferenceCreate"); }
  ~Preference() { library().preference_destroy(pointer_); }
  Preference(const Preference&) = delete;
  Preference& operator=(const Preference&) = delete;

  template <class T>
  void set(int attribute, T value) {
    succeed(library().preference_set(pointer_, attribute, &value, sizeof(value)),
            "cublasLtMatmulPreferenceSetAttribute");
  }
  void* get() const { return pointer_; }

 private:
  void* pointer_ = nullptr;
};

}  // namespace

const Library& library() {
  static const Library lib = load();  // an exception leaves it unset, and the next call tries again
  return lib;
}

std::string status_text(int status) {
  const char* text = "unknown status";
  switch (status) {
    case 0: text = "CUBLAS_STATUS_SUCCESS"; break;
    case 1: text = "CUBLAS_STATUS_NOT_INITIALIZED"; break;
    case 3: text = "CUBLAS_STATUS_ALLOC_FAILED"; break;
    case 7: text = "CUBLAS_STATUS_INVALID_VALUE"; break;
    case 8: text = "CUBLAS_STATUS_ARCH_MISMATCH"; break;
    case 11: text = "CUBLAS_STATUS_MAPPING_ERROR"; break;
    case 13: text = "CUBLAS_STATUS_EXECUTION_FAILED"; break;
    case 14: text = "CUBLAS_STATUS_INTERNAL_ERROR"; break;
    case 15: text = "CUBLAS_STATUS_NOT_SUPPORTED"; break;
    case 16: text = "CUBLAS_STATUS_LICENSE_ERROR"; break;
    default: break;
  }
  return std::string(text) + " (" + std::to_string(status) + ")";
}

Matmul::Matmul(const Plan& plan, const Buffers& buffers) : plan_(plan), buffers_(buffers) {
  const Library& lib = library();
  try {
    succeed(lib.desc_create(&desc_, kCompute32F, kR32F), "cublasLtMatmulDescCreate");
    const auto set = [&](int attribute, const auto& value) {
      succeed(lib.desc_set(desc_, attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
    };
    set(kDescTransA, plan.transa);
    set(kDescTransB, plan.transb);
    set(kDescEpilogue, plan.epilogue);
    set(kDescBiasPointer, buffers.bias);  // the type of bias and AUX is that of D unless told otherwise
    set(kDescAuxPointer, buffers.aux);
    set(kDescAuxLd, plan.aux_ld);
    const auto layout = [&](const Matrix& m, void** target) {
      succeed(lib.layout_create(target, data_type(plan.dtype), static_cast<uint64_t>(m.rows),
                                static_cast<uint64_t>(m.cols), m.ld),
              "cublasLtMatrixLayoutCreate");
    };
    layout(plan.a, &a_);
    layout(plan.b, &b_);
    layout(plan.d, &d_);
  } catch (...) {
    release();
    throw;
  }
}

Matmul::~Matmul() { release(); }

void Matmul::release() {
  const Library& lib = library();
  for (void* layout : {a_, b_, d_}) {
    if (layout != nullptr) lib.layout_destroy(layout);
  }
  if (desc_ != nullptr) lib.desc_destroy(desc_);
}

std::vector<Candidate> Matmul::candidates(void* handle, int64_t workspace_bytes, int64_t alignment, int count) const {
  Preference preference;
  preference.set(kPrefMaxWorkspace, static_cast<uint64_t>(workspace_bytes));
  preference.set(kPrefReductionMask, kReductionMask);
  for (int i = 0; i < 4; ++i) preference.set(kPrefAlignmentA + i, static_cast<uint32_t>(alignment));

  std::vector<HeuristicResult> results(static_cast<size_t>(count));
  int returned = 0;
  const int status = library().heuristic(handle, desc_, a_, b_, d_, d_, preference.get(), count, results.data(), &returned);
  constexpr int kNotSupported = 15;
  if (status == kNotSupported) return {};
  succeed(status, "cublasLtMatmulAlgoGetHeuristic");
  std::vector<Candidate> found;
  for (int i = 0; i < returned; ++i) {
    const HeuristicResult& r = results[static_cast<size_t>(i)];
    if (r.state == 0 && r.workspace <= static_cast<size_t>(workspace_bytes)) {
      found.push_back({r.algo, r.workspace, r.waves});
    }
  }
  return found;
}

int Matmul::run(void* handle, const Candidate& candidate, void* workspace, int64_t workspace_bytes,
                void* stream) const {
  const float alpha = 1.0f, beta = 0.0f;
  return library().matmul(handle, desc_, &alpha, buffers_.a, a_, buffers_.b, b_, &beta, buffers_.d, d_, buffers_.d, d_,
                          &candidate.algo, workspace, static_cast<size_t>(workspace_bytes), stream);
}

std::string Matmul::json() const {
  const Library& lib = library();
  size_t written = 0;
  const auto desc = [&](int attribute, auto value) {
    succeed(lib.desc_get(desc_, attribute, &value, sizeof(value), &written), "cublasLtMatmulDescGetAttribute");
    return value;
  };
  const auto layout = [&](void* of) {
    const auto get = [&](int attribute, auto value) {
      succeed(lib.layout_get(of, attribute, &value, sizeof(value), &written), "cublasLtMatrixLayoutGetAttribute");
      return std::to_string(value);
    };
    return "{\"type\": " + get(kLayoutType, uint32_t{0}) + ", \"order\": " + get(kLayoutOrder, int32_t{0}) +
           ", \"rows\": " + get(kLayoutRows, uint64_t{0}) + ", \"cols\": " + get(kLayoutCols, uint64_t{0}) +
           ", \"ld\": " + get(kLayoutLd, int64_t{0}) + "}";
  };
  const auto pointer = [&](int attribute) {
    return std::to_string(reinterpret_cast<uintptr_t>(desc(attribute, static_cast<void*>(nullptr))));
  };
  return "{\"version\": " + std::to_string(lib.version()) +
         ", \"transa\": " + std::to_string(desc(kDescTransA, int32_t{0})) +
         ", \"transb\": " + std::to_string(desc(kDescTransB, int32_t{0})) +
         ", \"epilogue\": " + std::to_string(desc(kDescEpilogue, uint32_t{0})) +
         ", \"aux_ld\": " + std::to_string(desc(kDescAuxLd, int64_t{0})) + ", \"bias\": " + pointer(kDescBiasPointer) +
         ", \"aux\": " + pointer(kDescAuxPointer) + ", \"A\": " + layout(a_) + ", \"B\": " + layout(b_) +
         ", \"D\": " + layout(d_) + "}";
}

}  // namespace difffit::cublaslt
