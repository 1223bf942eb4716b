// What has to be decided before cuBLASLt is called: the column-major layouts of row-major products, which shapes the
// fused epilogues take, which of the candidate algorithms to use, and the memory of that choice.
//
// Plain C++ without PyTorch and without CUDA, so that it is compiled into every build and tested on the CPU.
//
// cuBLASLt is column-major. A row-major matrix [rows, cols] is the column-major matrix cols × rows with leading
// dimension cols, its transpose. So a row-major product is asked for as its transpose:
//
//     linear_gelu    u = h·W1ᵀ + b1, g = GELU(u)        as  Gᵀ = GELU(W1·hᵀ + b1)           N × M, GELU_AUX_BIAS
//     dgelu_dgrad    du = (dbranch·W2) ⊙ GELU'(u), db1 = Σ_m
//                                             as  duᵀ = (W2ᵀ·dbranchᵀ) ⊙ GELU'(uᵀ)  N × M, DGELU_BGRAD
//
// Both outputs have N rows in column-major terms: the bias is indexed by row, the bias gradient is a sum over columns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace difffit::cublaslt {

// Values of cuBLASLt's and CUDA's C enumerations. They are part of its ABI (the same in CUDA 11, 12 and 13); where the
// header is there, csrc/cuda/linear_gelu.cu compares all of them with it at compile time.
constexpr int32_t kR32F = 0, kR16F = 2, kR16BF = 14;                             // cudaDataType
constexpr int32_t kOpN = 0, kOpT = 1;                                             // cublasOperation_t
constexpr int32_t kCompute32F = 68;                                               // cublasComputeType_t
constexpr uint32_t kEpilogueGeluAuxBias = 164, kEpilogueDgeluBgrad = 208;         // cublasLtEpilogue_t
constexpr int32_t kDescTransA = 3, kDescTransB = 4, kDescEpilogue = 7;            // cublasLtMatmulDescAttributes_t
constexpr int32_t kDescBiasPointer = 8, kDescAuxPointer = 11, kDescAuxLd = 12;
constexpr int32_t kLayoutType = 0, kLayoutOrder = 1, kLayoutRows = 2;             // cublasLtMatrixLayoutAttribute_t
constexpr int32_t kLayoutCols = 3, kLayoutLd = 4;
constexpr int32_t kPrefMaxWorkspace = 1, kPrefReductionMask = 3;                  // cublasLtMatmulPreferenceAttributes_t
constexpr int32_t kPrefAlignmentA = 5;                                            // B, C and D follow
// Split sums may only meet in float32: schemes NONE (0) and COMPUTE_TYPE (2), not in the 16-bit output.
constexpr uint32_t kReductionMask = 2;

enum class Op { linear_gelu, dgelu_dgrad };
enum class Dtype { bf16, fp16, fp32 };

Op parse_op(const std::string& name);           // throws for an unknown name
Dtype parse_dtype(const std::string& name);     // bfloat16, float16, float32
const char* name(Op op);
const char* name(Dtype dtype);

// A column-major matrix: element (i, j) lies at i + j·ld.
struct Matrix {
  int64_t rows, cols, ld;
};

// One call of cublasLtMatmul: D = epilogue(op(A)·op(B)), D of m × n, k summed over.
struct Plan {
  Op op;
  Dtype dtype;
  int32_t transa, transb;
  int64_t m, n, k;
  Matrix a, b, d;
  uint32_t epilogue;
  int64_t aux_ld, bias_length;
  const char *a_tensor, *b_tensor, *d_tensor, *aux_tensor, *bias_tensor;  // names of the row-major tensors
};

// linear_gelu: M rows of h, N rows of W1, K columns of both. dgelu_dgrad: M rows of dbranch, N columns of W2, K rows of W2
// (the width that is summed over).
Plan plan(Op op, int64_t M, int64_t N, int64_t K, Dtype dtype);

// Why the fused product cannot serve this problem, or nothing when it can. `alignment`: the largest power of two
// (at most 256) that divides the addresses of all matrices.
std::optional<std::string> refusal(int64_t M, int64_t N, int64_t K, Dtype dtype, int64_t alignment);

// The largest power of two, at most 256, that divides all the addresses.
int64_t common_alignment(const std::vector<uint64_t>& addresses);

// Bytes of workspace offered to the algorithms: 32 MiB from Hopper on, 4 MiB before, the sizes NVIDIA recommends.
int64_t workspace_bytes(int compute_capability_major);

// -- the choice of an algorithm --------------------------------------------------------------------------------------
struct Algo {  // cublasLtMatmulAlgo_t
  uint64_t data[8];
};

struct Candidate {
  Algo algo{};
  size_t workspace = 0;
  float waves = 0;
};

// Index of the candidate with the smallest median time; the lower index wins a tie, candidates without times have
// failed. -1 when all have failed.
int fastest(const std::vector<std::vector<float>>& times);
float median(std::vector<float> values);  // of a non-empty list

struct Key {
  int device;
  Op op;
  Dtype dtype;
  int64_t M, N, K, alignment;
  bool timed;  // chosen by timing, or the heuristic's first

  auto tuple() const { return std::tuple(device, op, dtype, M, N, K, alignment, timed); }
  bool operator<(const Key& other) const { return tuple() < other.tuple(); }
};

struct Choice {
  Candidate candidate;
  int index = 0;                 // in the heuristic's order
  std::vector<float> median_ms;  // of every candidate, -1 for one that failed; empty when nothing was timed
};

// What has been chosen, for all threads. The first choice stored for a key stays.
class Choices {
 public:
  std::optional<Choice> find(const Key& key) const;
  Choice store(const Key& key, const Choice& choice);  // returns the one that stays
  std::string json() const;
  void clear();

 private:
  mutable std::mutex mutex_;
  std::map<Key, Choice> map_;
};

// -- telling ---------------------------------------------------------------------------------------------------------
std::string json(const Plan& plan);
std::string problem_text(const char* op, int64_t M, int64_t N, int64_t K, Dtype dtype);

}  // namespace difffit::cublaslt
