// linear_gelu and dgelu_dgrad: fc1 with its activation, and the input gradient of fc2 with the activation's backward and
// fc1's bias gradient, each as one matrix product with a cuBLASLt epilogue (layouts in cublaslt_host.h).
//
//     linear_gelu   u = h·W1ᵀ + b1,  g = GELU(u)            GELU in its tanh form, of the float32 accumulator
//     dgelu_dgrad   du = (dbranch·W2) ⊙ GELU'(u),  db1 = Σ_m du
//
// bfloat16 and float16, float32 accumulation. cuBLASLt takes the bias and gives its gradient in the type of the output,
// so b1 comes in that type and db1 is rounded to it once, then widened.
//
// Bytes beyond the operands: linear_gelu writes u and g, dgelu_dgrad reads u and writes du; unfused, the activation adds
// a read of u, and its backward adds a write and a read of dg.
#include "check.h"

#include "../cublaslt_library.h"

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#elif defined(DIFFFIT_FAST_NEED_CUBLASLT_HEADER)
#error "cublasLt.h was not found: pip install nvidia-cublas, or give its folder with -I"
#endif

namespace difffit::cublaslt {

#if __has_include(<cublasLt.h>)  // cublaslt_host.h against the vendor's header
static_assert(kR32F == CUDA_R_32F && kR16F == CUDA_R_16F && kR16BF == CUDA_R_16BF);
static_assert(kOpN == CUBLAS_OP_N && kOpT == CUBLAS_OP_T && kCompute32F == CUBLAS_COMPUTE_32F);
static_assert(kEpilogueGeluAuxBias == CUBLASLT_EPILOGUE_GELU_AUX_BIAS);
static_assert(kEpilogueDgeluBgrad == CUBLASLT_EPILOGUE_DGELU_BGRAD);
static_assert(kDescTransA == CUBLASLT_MATMUL_DESC_TRANSA && kDescTransB == CUBLASLT_MATMUL_DESC_TRANSB);
static_assert(kDescEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE);
static_assert(kDescBiasPointer == CUBLASLT_MATMUL_DESC_BIAS_POINTER);
static_assert(kDescAuxPointer == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER);
static_assert(kDescAuxLd == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD);
static_assert(kLayoutType == CUBLASLT_MATRIX_LAYOUT_TYPE && kLayoutOrder == CUBLASLT_MATRIX_LAYOUT_ORDER);
static_assert(kLayoutRows == CUBLASLT_MATRIX_LAYOUT_ROWS && kLayoutCols == CUBLASLT_MATRIX_LAYOUT_COLS);
static_assert(kLayoutLd == CUBLASLT_MATRIX_LAYOUT_LD);
static_assert(kPrefMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(kPrefReductionMask == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
static_assert(kReductionMask == (CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
static_assert(kPrefAlignmentA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
static_assert(kPrefAlignmentA + 1 == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
static_assert(kPrefAlignmentA + 2 == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
static_assert(kPrefAlignmentA + 3 == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
static_assert(sizeof(Algo) == sizeof(cublasLtMatmulAlgo_t) && alignof(Algo) == alignof(cublasLtMatmulAlgo_t));
static_assert(sizeof(HeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(HeuristicResult, workspace) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(HeuristicResult, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(offsetof(HeuristicResult, waves) == offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));
#endif

namespace {

using cuda::ScalarType;
using cuda::Tensor;

constexpr int kCandidates = 8;  // asked of the heuristic
constexpr int kRounds = 5;      // times each candidate is timed, in turn with the others
constexpr int kLaunches = 3;    // in one timing

Choices& choices() {
  static Choices all;
  return all;
}

Dtype dtype_of(const char* op, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, op,
                  ": the first tensor must be bfloat16 or float16; got ", torch::headeronly::toString(type));
  return type == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::fp16;
}

class Event {
 public:
  Event() { STD_CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// One problem on one device and stream: its descriptors, PyTorch's cuBLAS handle and a workspace of PyTorch's.
struct Call {
  const char* op;
  Key key;
  Matmul matmul;
  void* handle;
  Tensor workspace;
  int64_t workspace_bytes;
  cudaStream_t stream;

  int run(const Candidate& candidate) const {
    return matmul.run(handle, candidate, workspace.mutable_data_ptr(), workspace_bytes, stream);
  }
};

// Times every candidate on the data at hand; the losers' outputs are overwritten by the call that follows.
Choice time(const Call& call, const std::vector<Candidate>& candidates) {
  const size_t count = candidates.size();
  std::vector<std::vector<float>> times(count);
  std::vector<bool> works(count);
  for (size_t i = 0; i < count; ++i) works[i] = call.run(candidates[i]) == 0;  // also loads the kernel
  const Event start, stop;
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < count; ++i) {
      if (!works[i]) continue;
      STD_CUDA_CHECK(cudaEventRecord(start.get(), call.stream));
      for (int launch = 0; launch < kLaunches; ++launch) call.run(candidates[i]);
      STD_CUDA_CHECK(cudaEventRecord(stop.get(), call.stream));
      STD_CUDA_CHECK(cudaEventSynchronize(stop.get()));
      float ms = 0;
      STD_CUDA_CHECK(cudaEventElapsedTime(&ms, start.get(), stop.get()));
      times[i].push_back(ms / kLaunches);
    }
  }
  const int best = fastest(times);
  STD_TORCH_CHECK(best >= 0, call.op, ": all ", count, " algorithms that cuBLASLt proposed failed to run");
  Choice choice{candidates[static_cast<size_t>(best)], best, {}};
  for (const auto& of : times) choice.median_ms.push_back(of.empty() ? -1.0f : median(of));
  return choice;
}

// The algorithm for this problem: what was chosen before; else the fastest, or without timing the heuristic's first.
Choice choose(const Call& call, bool tune) {
  Key key = call.key;
  const bool may_time = tune && !capturing(call.stream);  // a graph capture allows no waiting
  if (tune) {
    key.timed = true;
    if (const auto known = choices().find(key)) return *known;
  }
  key.timed = false;
  if (!may_time) {
    if (const auto known = choices().find(key)) return *known;
  }
  const auto candidates = call.matmul.candidates(call.handle, call.workspace_bytes, key.alignment, kCandidates);
  STD_TORCH_CHECK(!candidates.empty(), "cuBLASLt has no algorithm for ",
                  problem_text(call.op, key.M, key.N, key.K, key.dtype));
  if (!may_time) return choices().store(key, Choice{candidates.front(), 0, {}});
  key.timed = true;
  return choices().store(key, time(call, candidates));
}

void multiply(Op op, int64_t M, int64_t N, int64_t K, const Tensor& a, const Tensor& b, const Tensor& d,
              const Tensor& aux, const Tensor& bias, bool tune) {
  const char* label = name(op);
  const Dtype dtype = dtype_of(label, b);
  const Buffers buffers{a.const_data_ptr(), b.const_data_ptr(), d.mutable_data_ptr(), aux.mutable_data_ptr(),
                        bias.mutable_data_ptr()};
  std::vector<uint64_t> addresses;
  for (const void* p : {buffers.a, buffers.b, static_cast<const void*>(buffers.d), static_cast<const void*>(buffers.aux),
                        static_cast<const void*>(buffers.bias)}) {
    addresses.push_back(reinterpret_cast<uint64_t>(p));
  }
  const int64_t alignment = common_alignment(addresses);
  const auto why_not = refusal(M, N, K, dtype, alignment);
  STD_TORCH_CHECK(!why_not, problem_text(label, M, N, K, dtype), " cannot be fused: ", why_not.value_or(""));

  const int device = b.get_device_index();
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  const int64_t bytes = workspace_bytes(major);
  void* handle = nullptr;  // a cublasHandle_t serves as cublasLtHandle_t
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  const Call call{label,
                  Key{device, op, dtype, M, N, K, alignment, false},
                  Matmul(plan(op, M, N, K, dtype), buffers),
                  handle,
                  cuda::empty(b, {bytes}, ScalarType::Byte),
                  bytes,
                  cuda::current_stream(b)};
  const int status = call.run(choose(call, tune).candidate);
  STD_TORCH_CHECK(status == 0, problem_text(label, M, N, K, dtype), ": cublasLtMatmul failed: ", status_text(status));
}

std::tuple<Tensor, Tensor> linear_gelu(const Tensor& h, const Tensor& w1, const Tensor& b1, bool tune) {
  const char* op = "linear_gelu";
  cuda::check_matrix(op, "h", h);
  cuda::check_matrix(op, "w1", w1);
  dtype_of(op, h);
  const int64_t M = h.size(0), K = h.size(1), N = w1.size(0);
  const ScalarType type = h.scalar_type();
  cuda::check(op, "h", h, {M, K}, type, h);
  cuda::check(op, "w1", w1, {N, K}, type, h);
  cuda::check(op, "b1", b1, {N}, type, h);
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  Tensor g = cuda::empty(h, {M, N}, type), u = cuda::empty(h, {M, N}, type);
  if (M > 0) multiply(Op::linear_gelu, M, N, K, w1, h, g, u, b1, tune);
  return {g, u};
}

std::tuple<Tensor, Tensor> dgelu_dgrad(const Tensor& dbranch, const Tensor& w2, const Tensor& u, bool tune) {
  const char* op = "dgelu_dgrad";
  cuda::check_matrix(op, "dbranch", dbranch);
  cuda::check_matrix(op, "w2", w2);
  dtype_of(op, dbranch);
  const int64_t M = dbranch.size(0), K = dbranch.size(1), N = w2.size(1);
  const ScalarType type = dbranch.scalar_type();
  cuda::check(op, "dbranch", dbranch, {M, K}, type, dbranch);
  cuda::check(op, "w2", w2, {K, N}, type, dbranch);
  cuda::check(op, "u", u, {M, N}, type, dbranch);
  const torch::stable::accelerator::DeviceGuard guard(dbranch.get_device_index());
  Tensor du = cuda::empty(dbranch, {M, N}, type);
  if (M == 0) return {du, cuda::zeros(dbranch, {N}, ScalarType::Float)};
  Tensor db1 = cuda::empty(dbranch, {N}, type);
  multiply(Op::dgelu_dgrad, M, N, K, w2, dbranch, du, u, db1, tune);
  return {du, torch::stable::to(db1, ScalarType::Float)};
}

std::string choices_json() { return choices().json(); }

int64_t version() { return static_cast<int64_t>(library().version()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cuda, m) {
  m.def("linear_gelu(Tensor h, Tensor w1, Tensor b1, bool tune=True) -> (Tensor, Tensor)");
  m.def("dgelu_dgrad(Tensor dbranch, Tensor w2, Tensor u, bool tune=True) -> (Tensor, Tensor)");
  m.def("cublaslt_choices() -> str");
  m.def("cublaslt_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cuda, CUDA, m) {
  m.impl("linear_gelu", TORCH_BOX(&linear_gelu));
  m.impl("dgelu_dgrad", TORCH_BOX(&dgelu_dgrad));
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("cublaslt_choices", TORCH_BOX(&choices_json));
  m.impl("cublaslt_version", TORCH_BOX(&version));
}

}  // namespace difffit::cublaslt
