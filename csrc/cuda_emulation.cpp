// The host side of the CUDA operations, callable without a GPU: for tests and reports.
//
// The plans of the cuBLASLt calls as JSON, the same as read back from cuBLASLt's own descriptors (which it makes without
// a device), and the CUDA column sum with its threads run one after another.
#include "cublaslt_library.h"
#include "cuda/colsum_device.h"
#include "ops.h"

#include <bit>

namespace difffit {
namespace {

namespace lt = cublaslt;
namespace sums = colsum_cuda;

std::string cublaslt_plan(std::string op, int64_t M, int64_t N, int64_t K, std::string dtype) {
  return lt::json(lt::plan(lt::parse_op(op), M, N, K, lt::parse_dtype(dtype)));
}

// Addresses 16·1 … 16·5 stand for A, B, D, AUX and bias: nothing is read from them.
std::string cublaslt_descriptors(std::string op, int64_t M, int64_t N, int64_t K, std::string dtype) {
  const auto at = [](uintptr_t i) { return reinterpret_cast<void*>(16 * i); };
  return lt::Matmul(lt::plan(lt::parse_op(op), M, N, K, lt::parse_dtype(dtype)), {at(1), at(2), at(3), at(4), at(5)})
      .json();
}

// The product of CPU tensors through the calls that the CUDA operations make, with the second of the candidates when
// there are several: for a cuBLASLt made for tests (DIFFFIT_FAST_CUBLASLT_LIBRARY). Returns the number of candidates.
int64_t cublaslt_run(std::string op, const Tensor& a, const Tensor& b, Tensor d, Tensor aux, Tensor bias, int64_t M,
                     int64_t N, int64_t K) {
  for (const Tensor& t : {a, b, d, aux, bias}) {
    STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == a.scalar_type(),
                    "cublaslt_run: contiguous CPU tensors of one dtype are expected");
  }
  const lt::Dtype dtype = a.scalar_type() == ScalarType::BFloat16 ? lt::Dtype::bf16 : lt::Dtype::fp32;
  const lt::Buffers buffers{a.const_data_ptr(), b.const_data_ptr(), d.mutable_data_ptr(), aux.mutable_data_ptr(),
                            bias.mutable_data_ptr()};
  const lt::Matmul matmul(lt::plan(lt::parse_op(op), M, N, K, dtype), buffers);
  int handle = 0, stream = 0;
  constexpr int64_t kBytes = 4096;
  std::vector<char> workspace(kBytes);
  const auto candidates = matmul.candidates(&handle, kBytes, 64, 8);
  if (candidates.empty()) return 0;
  const int status = matmul.run(&handle, candidates[candidates.size() > 1], workspace.data(), kBytes, &stream);
  STD_TORCH_CHECK(status == 0, "cublaslt_run: ", lt::status_text(status));
  return static_cast<int64_t>(candidates.size());
}

std::string cublaslt_refusal(int64_t M, int64_t N, int64_t K, std::string dtype, int64_t alignment) {
  return lt::refusal(M, N, K, lt::parse_dtype(dtype), alignment).value_or("");
}

int64_t cublaslt_alignment(std::vector<int64_t> addresses) {
  return lt::common_alignment(std::vector<uint64_t>(addresses.begin(), addresses.end()));
}

int64_t cublaslt_workspace(int64_t major) { return lt::workspace_bytes(static_cast<int>(major)); }

std::string cublaslt_status(int64_t status) { return lt::status_text(static_cast<int>(status)); }

// Rows are candidates, columns their times; a negative time is a failure.
int64_t cublaslt_fastest(const Tensor& times) {
  check("cublaslt_fastest", "times", times, 2, true);
  std::vector<std::vector<float>> all(static_cast<size_t>(times.size(0)));
  const float* p = in<float>(times);
  for (auto& row : all) {
    for (int64_t j = 0; j < times.size(1); ++j, ++p) {
      if (*p >= 0) row.push_back(*p);
    }
  }
  return lt::fastest(all);
}

// `threads` threads store their own choice for each of `keys` keys at once; returns how often a thread was given another
// choice than the one that stayed (0 when the cache is right), and in JSON what stayed.
std::tuple<int64_t, std::string> cublaslt_cache(int64_t threads, int64_t keys) {
  lt::Choices cache;
  std::vector<int> given(static_cast<size_t>(threads * keys));
  const auto key = [](int64_t i) {
    return lt::Key{0, i % 2 ? lt::Op::linear_gelu : lt::Op::dgelu_dgrad, lt::Dtype::bf16, 256 * (i + 1), 64, 32, 256, true};
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < keys; ++i) {
        lt::Choice mine;
        mine.index = static_cast<int>(t);
        mine.median_ms = {1.5f, -1.0f};
        given[static_cast<size_t>(t * keys + i)] = cache.store(key(i), mine).index;
      }
    }
  });
  int64_t wrong = 0;
  for (int64_t t = 0; t < threads; ++t) {
    for (int64_t i = 0; i < keys; ++i) wrong += given[static_cast<size_t>(t * keys + i)] != cache.find(key(i))->index;
  }
  if (cache.find(lt::Key{1, lt::Op::linear_gelu, lt::Dtype::bf16, 512, 64, 32, 256, true})) ++wrong;  // another device
  return {wrong, cache.json()};
}

// -- the CUDA column sum, thread by thread ---------------------------------------------------------------------------
template <class T, int V>
void emulate_chunks(const T* x, int64_t stride, int64_t rows, int64_t columns, sums::Cut cut, float* out) {
  const auto load = [](const T* from, float* values) {
    for (int v = 0; v < V; ++v) {
      if constexpr (sizeof(T) == 4) {
        values[v] = from[v];
      } else {
        values[v] = std::bit_cast<float>(uint32_t{from[v].bits} << 16);
      }
    }
  };
  constexpr int width = sums::kLanes * V;
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    for (int64_t block = 0; block * width < columns; ++block) {
      float shared[sums::kWarps][width];
      const int64_t first = chunk * cut.chunk_rows, end = std::min(first + cut.chunk_rows, rows);
      for (int warp = 0; warp < sums::kWarps; ++warp) {
        for (int lane = 0; lane < sums::kLanes; ++lane) {
          const int64_t column = block * width + lane * V;
          float total[V] = {};
          if (column < columns) sums::add_rows<V>(x + column, stride, first + warp, end, total, load);
          for (int v = 0; v < V; ++v) shared[warp][lane * V + v] = total[v];
        }
      }
      for (int c = 0; c < width && block * width + c < columns; ++c) {
        out[chunk * columns + block * width + c] = sums::add_warps(&shared[0][0], width, c);
      }
    }
  }
}

Tensor colsum_emulated(const Tensor& x, bool vectors) {
  check("colsum_emulated", "x", x, 2);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor total = empty(x, {columns});
  if (rows == 0 || columns == 0) {
    std::fill_n(out<float>(total), columns, 0.0f);
    return total;
  }
  const sums::Cut cut = sums::cut_rows(rows);
  std::vector<float> partial(static_cast<size_t>(cut.chunks * columns));
  dispatch(x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int V = 16 / sizeof(T);
    const bool wide = vectors && columns % V == 0;
    (wide ? emulate_chunks<T, V> : emulate_chunks<T, 1>)(in<T>(x), columns, rows, columns, cut, partial.data());
  });
  emulate_chunks<float, 1>(partial.data(), columns, cut.chunks, columns, {cut.chunks, 1}, out<float>(total));
  return total;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def("cublaslt_plan(str op, int M, int N, int K, str dtype) -> str");
  m.def("cublaslt_descriptors(str op, int M, int N, int K, str dtype) -> str");
  m.def(
      "cublaslt_run(str op, Tensor a, Tensor b, Tensor(a!) d, Tensor(b!) aux, Tensor(c!) bias, int M, int N, int K) -> "
      "int");
  m.def("cublaslt_refusal(int M, int N, int K, str dtype, int alignment) -> str");
  m.def("cublaslt_alignment(int[] addresses) -> int");
  m.def("cublaslt_workspace(int major) -> int");
  m.def("cublaslt_status(int status) -> str");
  m.def("cublaslt_fastest(Tensor times) -> int");
  m.def("cublaslt_cache(int threads, int keys) -> (int, str)");
  m.def("colsum_emulated(Tensor x, bool vectors) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("cublaslt_plan", TORCH_BOX(&cublaslt_plan));
  m.impl("cublaslt_descriptors", TORCH_BOX(&cublaslt_descriptors));
  m.impl("cublaslt_refusal", TORCH_BOX(&cublaslt_refusal));
  m.impl("cublaslt_alignment", TORCH_BOX(&cublaslt_alignment));
  m.impl("cublaslt_workspace", TORCH_BOX(&cublaslt_workspace));
  m.impl("cublaslt_status", TORCH_BOX(&cublaslt_status));
  m.impl("cublaslt_cache", TORCH_BOX(&cublaslt_cache));
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("cublaslt_run", TORCH_BOX(&cublaslt_run));
  m.impl("cublaslt_fastest", TORCH_BOX(&cublaslt_fastest));
  m.impl("colsum_emulated", TORCH_BOX(&colsum_emulated));
}

}  // namespace difffit
