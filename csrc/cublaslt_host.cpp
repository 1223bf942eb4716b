#include "cublaslt_host.h"

#include <algorithm>
#include <stdexcept>

namespace difffit::cublaslt {

Op parse_op(const std::string& name) {
  if (name == "linear_gelu") return Op::linear_gelu;
  if (name == "dgelu_dgrad") return Op::dgelu_dgrad;
  throw std::invalid_argument("op must be linear_gelu or dgelu_dgrad; got '" + name + "'");
}

Dtype parse_dtype(const std::string& name) {
  if (name == "bfloat16") return Dtype::bf16;
  if (name == "float16") return Dtype::fp16;
  if (name == "float32") return Dtype::fp32;
  throw std::invalid_argument("dtype must be bfloat16, float16 or float32; got '" + name + "'");
}

const char* name(Op op) { return op == Op::linear_gelu ? "linear_gelu" : "dgelu_dgrad"; }

const char* name(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return "bfloat16";
    case Dtype::fp16: return "float16";
    default: return "float32";
  }
}

std::string problem_text(const char* op, int64_t M, int64_t N, int64_t K, Dtype dtype) {
  return std::string(op) + " with M = " + std::to_string(M) + ", N = " + std::to_string(N) +
         ", K = " + std::to_string(K) + " in " + name(dtype);
}

Plan plan(Op op, int64_t M, int64_t N, int64_t K, Dtype dtype) {
  if (M < 0 || N < 0 || K < 0) {
    throw std::invalid_argument("sizes must not be negative; got " + problem_text(name(op), M, N, K, dtype));
  }
  Plan p{};
  p.op = op;
  p.dtype = dtype;
  p.m = N;
  p.n = M;
  p.k = K;
  p.transb = kOpN;
  p.b = {K, M, K};  // h or dbranch, transposed by reading it column by column
  p.d = {N, M, N};
  p.aux_ld = N;  // u has the layout of D
  p.bias_length = N;
  p.aux_tensor = "u";
  if (op == Op::linear_gelu) {
    p.transa = kOpT;  // W1 is [N, K] in rows, K × N in columns, wanted N × K
    p.a = {K, N, K};
    p.epilogue = kEpilogueGeluAuxBias;
    p.a_tensor = "w1";
    p.b_tensor = "h";
    p.d_tensor = "g";
    p.bias_tensor = "b1";
  } else {
    p.transa = kOpN;  // W2 is [K, N] in rows, N × K in columns, as wanted
    p.a = {N, K, N};
    p.epilogue = kEpilogueDgeluBgrad;
    p.a_tensor = "w2";
    p.b_tensor = "dbranch";
    p.d_tensor = "du";
    p.bias_tensor = "db1";
  }
  return p;
}

std::optional<std::string> refusal(int64_t M, int64_t N, int64_t K, Dtype dtype, int64_t alignment) {
  constexpr int64_t kMultiple = 8;  // cuBLASLt asks it of the AUX leading dimension; 16-byte rows need it of the others
  constexpr int64_t kLimit = (int64_t{1} << 31) - 1;
  if (dtype == Dtype::fp32) return "float32 is not fused: the epilogues are for bfloat16 and float16";
  if (M == 0 || N == 0 || K == 0) return "a size is 0";
  if (N % kMultiple != 0) return "N = " + std::to_string(N) + " is not a multiple of 8";
  if (K % kMultiple != 0) return "K = " + std::to_string(K) + " is not a multiple of 8";
  if (M > kLimit || N > kLimit || K > kLimit) return "a size exceeds 2^31 - 1";
  if (alignment < 16) return "the tensors are aligned to " + std::to_string(alignment) + " bytes, not to 16";
  return std::nullopt;
}

int64_t common_alignment(const std::vector<uint64_t>& addresses) {
  uint64_t bits = 256;
  for (uint64_t address : addresses) bits |= address;
  return static_cast<int64_t>(bits & (~bits + 1));  // the lowest bit that is set
}

int64_t workspace_bytes(int compute_capability_major) {
  return int64_t{compute_capability_major >= 9 ? 32 : 4} << 20;
}

float median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : 0.5f * (values[half - 1] + values[half]);
}

int fastest(const std::vector<std::vector<float>>& times) {
  int best = -1;
  float best_time = 0;
  for (size_t i = 0; i < times.size(); ++i) {
    if (times[i].empty()) continue;
    const float time = median(times[i]);
    if (best < 0 || time < best_time) {
      best = static_cast<int>(i);
      best_time = time;
    }
  }
  return best;
}

std::optional<Choice> Choices::find(const Key& key) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto at = map_.find(key);
  if (at == map_.end()) return std::nullopt;
  return at->second;
}

Choice Choices::store(const Key& key, const Choice& choice) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return map_.try_emplace(key, choice).first->second;
}

void Choices::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  map_.clear();
}

std::string Choices::json() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string out = "[";
  for (const auto& [key, choice] : map_) {
    if (out.size() > 1) out += ", ";
    out += std::string("{\"device\": ") + std::to_string(key.device) + ", \"op\": \"" + name(key.op) +
           "\", \"dtype\": \"" + name(key.dtype) + "\", \"M\": " + std::to_string(key.M) +
           ", \"N\": " + std::to_string(key.N) + ", \"K\": " + std::to_string(key.K) +
           ", \"alignment\": " + std::to_string(key.alignment) + ", \"timed\": " + (key.timed ? "true" : "false") +
           ", \"algorithm\": " + std::to_string(choice.index) +
           ", \"workspace\": " + std::to_string(choice.candidate.workspace) + ", \"median_ms\": [";
    for (size_t i = 0; i < choice.median_ms.size(); ++i) {
      out += (i ? ", " : "") + std::to_string(choice.median_ms[i]);
    }
    out += "]}";
  }
  return out + "]";
}

namespace {

std::string json(const Matrix& m) {
  return "{\"rows\": " + std::to_string(m.rows) + ", \"cols\": " + std::to_string(m.cols) +
         ", \"ld\": " + std::to_string(m.ld) + "}";
}

}  // namespace

std::string json(const Plan& p) {
  return std::string("{\"op\": \"") + name(p.op) + "\", \"dtype\": \"" + name(p.dtype) +
         "\", \"transa\": " + std::to_string(p.transa) + ", \"transb\": " + std::to_string(p.transb) +
         ", \"m\": " + std::to_string(p.m) + ", \"n\": " + std::to_string(p.n) + ", \"k\": " + std::to_string(p.k) +
         ", \"A\": " + json(p.a) + ", \"B\": " + json(p.b) + ", \"D\": " + json(p.d) +
         ", \"epilogue\": " + std::to_string(p.epilogue) + ", \"aux_ld\": " + std::to_string(p.aux_ld) +
         ", \"bias_length\": " + std::to_string(p.bias_length) + ", \"tensors\": {\"A\": \"" + p.a_tensor +
         "\", \"B\": \"" + p.b_tensor + "\", \"D\": \"" + p.d_tensor + "\", \"aux\": \"" + p.aux_tensor +
         "\", \"bias\": \"" + p.bias_tensor + "\"}}";
}

}  // namespace difffit::cublaslt
