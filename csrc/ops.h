// What every operation needs on the host side: checks that say what was expected and what came, the choice of element
// types, rows cut into chunks, and the sum of the chunks' partial sums.
//
// A chunk is a fixed number of rows of one sample. It owns its partial column sums; those of all chunks are added in
// their order afterwards. So a result depends on neither the number of threads nor their timing.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

namespace difffit {

struct bf16 {  // arithmetic is done in float; see load and store in simd.h
  uint16_t bits;
};

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// -- checks ----------------------------------------------------------------------------------------------------------
inline std::string text(const int64_t* sizes, size_t n) {
  std::string out = "(";
  for (size_t i = 0; i < n; ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + ")";
}

inline std::string shape(const Tensor& t) { return text(t.sizes().data(), t.sizes().size()); }

// A dense CPU tensor with `dims` dimensions in float32 or bfloat16; only float32 when `only_float` is set.
inline void check(const char* op, const char* name, const Tensor& t, int64_t dims, bool only_float = false) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be a CPU tensor");
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || (type == ScalarType::BFloat16 && !only_float), op, ": ", name,
                  " must be float32", only_float ? "" : " or bfloat16", "; got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(t.dim() == dims, op, ": ", name, " must have ", dims, " dimensions; got shape ", shape(t));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous; got shape ", shape(t), " with strides ",
                  text(t.strides().data(), t.strides().size()));
}

inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> expected,
                        bool only_float = false) {
  check(op, name, t, static_cast<int64_t>(expected.size()), only_float);
  STD_TORCH_CHECK(std::equal(expected.begin(), expected.end(), t.sizes().data()), op, ": ", name, " must have shape ",
                  text(expected.begin(), expected.size()), "; got ", shape(t));
}

inline void check_vector(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
  check_shape(op, name, t, expected, true);
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), op, ": ", name, " must have the dtype of ", other_name, ", ",
                  torch::headeronly::toString(other.scalar_type()), "; got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// -- element types ---------------------------------------------------------------------------------------------------
template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<float>{}) or f(Type<bf16>{}); the dtype has been checked.
template <class F>
void dispatch(ScalarType type, F f) {
  if (type == ScalarType::BFloat16) {
    f(Type<bf16>{});
  } else {
    f(Type<float>{});
  }
}

template <class F>
void dispatch(ScalarType first, ScalarType second, F f) {
  dispatch(first, [&](auto x) { dispatch(second, [&](auto h) { f(x, h); }); });
}

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

// -- memory ----------------------------------------------------------------------------------------------------------
// Floats that begin on a cache line, not initialised.
struct Aligned {
  float* data;

  explicit Aligned(int64_t floats) : memory_(new char[floats * sizeof(float) + kLine]) {
    size_t bytes = floats * sizeof(float) + kLine;
    void* aligned = memory_.get();
    data = static_cast<float*>(std::align(kLine, floats * sizeof(float), aligned, bytes));
  }

 private:
  static constexpr size_t kLine = 64;
  std::unique_ptr<char[]> memory_;
};

constexpr int64_t kGranule = 16;  // the widest vector: sizes that are multiples of it need no half vectors

// -- chunks ----------------------------------------------------------------------------------------------------------
constexpr int64_t kChunkRows = 32;
constexpr int64_t kGrain = 16384;  // elements below which a thread is not worth waking

struct Chunk {
  int64_t index, sample, row, rows;  // row counts from the first row of the first sample
};

class Chunks {
 public:
  // `samples` blocks of `rows` rows of `width` elements.
  Chunks(int64_t samples, int64_t rows, int64_t width)
      : samples_(samples), rows_(rows), width_(width), per_sample_((rows + kChunkRows - 1) / kChunkRows) {}

  int64_t count() const { return samples_ * per_sample_; }
  int64_t samples() const { return samples_; }
  int64_t rows() const { return rows_; }  // of each sample
  int64_t per_sample() const { return per_sample_; }
  int64_t width() const { return width_; }

  template <class F>
  void run(F f) const {
    if (count() == 0) return;
    const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(rows_, kChunkRows) * std::max<int64_t>(1, width_)));
    torch::stable::parallel_for(0, count(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / per_sample_, first = (i % per_sample_) * kChunkRows;
        f(Chunk{i, sample, sample * rows_ + first, std::min(kChunkRows, rows_ - first)});
      }
    });
  }

 private:
  int64_t samples_, rows_, width_, per_sample_;
};

// The chunks' column sums: `sums` rows of `width` floats a chunk, not initialised.
class Partials {
 public:
  Partials(const Chunks& chunks, int64_t sums, int64_t width)
      : chunks_(chunks), sums_(sums), width_(width), data_(new float[chunks.count() * sums * width]) {}

  float* of(const Chunk& chunk) const { return data_.get() + chunk.index * sums_ * width_; }
  float* data() const { return data_.get(); }

  // Adds the chunks of each sample, in their order, into one (samples, width) tensor for each sum.
  using Sum = void (*)(const float*, int64_t, int64_t, float*, int64_t);
  void reduce(Sum sum, std::initializer_list<Tensor> totals) const {
    std::vector<float*> targets;
    for (const Tensor& total : totals) targets.push_back(out<float>(total));
    reduce(sum, targets);
  }

  // The same into one tensor (sums, samples, width).
  void reduce(Sum sum, const Tensor& total) const {
    std::vector<float*> targets;
    for (int64_t i = 0; i < sums_; ++i) targets.push_back(out<float>(total) + i * chunks_.samples() * width_);
    reduce(sum, targets);
  }

  // Of one sum: the chunks of all samples into one vector (width).
  void reduce_all(Sum sum, const Tensor& total) const {
    reduce(sum, {out<float>(total)}, 1, chunks_.count());
  }

 private:
  void reduce(Sum sum, const std::vector<float*>& targets) const {
    reduce(sum, targets, chunks_.samples(), chunks_.per_sample());
  }

  void reduce(Sum sum, const std::vector<float*>& targets, int64_t samples, int64_t per_sample) const {
    constexpr int64_t block = 512;
    const int64_t blocks = (width_ + block - 1) / block;
    const int64_t items = samples * sums_ * blocks;
    const int64_t grain = std::max<int64_t>(1, kGrain / (block * std::max<int64_t>(1, per_sample)));
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = (i % blocks) * block, which = i / blocks % sums_, sample = i / (blocks * sums_);
        const float* first = data_.get() + (sample * per_sample * sums_ + which) * width_ + column;
        sum(first, per_sample, sums_ * width_, targets[which] + sample * width_ + column,
            std::min(block, width_ - column));
      }
    });
  }

  Chunks chunks_;
  int64_t sums_, width_;
  std::unique_ptr<float[]> data_;
};

}  // namespace difffit
