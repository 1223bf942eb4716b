// What operations need on the host side whose products are made by the kernels of matmul_kernels.h: packed weights, rows
// cut into units, and which of these kernels this processor runs. Included behind foreach_isa.h, with that header among the
// kernels.
#pragma once

#include "ops.h"

#include <type_traits>

// The version of a kernel (a template of E, and more) for numbers of E on this processor. bfloat16 is multiplied by
// avx512_bf16 alone, which has been checked: see check_multiplies.
#ifdef DIFFFIT_X86
#define DIFFFIT_PICK_FOR(E, ...)                                     \
  [] {                                                               \
    if constexpr (std::is_same_v<E, ::difffit::bf16>) {              \
      return &avx512_bf16::__VA_ARGS__;                              \
    } else {                                                         \
      return DIFFFIT_PICK(__VA_ARGS__);                              \
    }                                                                \
  }()
#else
#define DIFFFIT_PICK_FOR(E, ...) DIFFFIT_PICK(__VA_ARGS__)
#endif

namespace difffit {
namespace {

inline void check_multiplies(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || isa() == Isa::avx512_bf16, op, ": ", name,
                  " must be float32, or bfloat16 on a processor of AMD with AVX512_BF16 (on others DIFFFIT_FAST_CPU=avx512_bf16"
                  " asks for it); got bfloat16, and the kernels run on ", isa_name());
}

// Calls f(Type<E>{}) with the dtype of t, which has been checked.
template <class F>
void dispatch_multiplied(const Tensor& t, F f) {
#ifdef DIFFFIT_X86
  if (t.scalar_type() == ScalarType::BFloat16) return f(Type<bf16>{});
#endif
  f(Type<float>{});
}

// A frozen weight (n, k) for products with its transpose, or (k, n) for products with it as it is, in panels of n.
template <class E>
Aligned packed(const Tensor& w, bool transposed) {
  const int64_t k = w.size(transposed ? 1 : 0), n = w.size(transposed ? 0 : 1);
  using Pack = void (*)(const E*, float*, int64_t, int64_t, int64_t, int64_t);
  Pack pack;
  if constexpr (std::is_same_v<E, float>) {
    pack = transposed ? static_cast<Pack>(DIFFFIT_PICK(pack_rows)) : static_cast<Pack>(DIFFFIT_PICK(pack_columns));
  } else {
#ifdef DIFFFIT_X86
    pack = transposed ? static_cast<Pack>(&avx512_bf16::pack_rows) : static_cast<Pack>(&avx512_bf16::pack_columns);
#endif
  }
  Aligned memory(DIFFFIT_PICK(panels_size)(n, k * sizeof(E) / sizeof(float)));
  torch::stable::parallel_for(0, DIFFFIT_PICK(panels)(n), 4, [&](int64_t begin, int64_t end) {
    pack(in<E>(w), memory.data, k, n, begin, end);
  });
  return memory;
}

// Runs f(chunk, memory) for units of whole chunks of one sample, about as many for each thread and of at most `most` chunks,
// with `room`(rows) floats; a unit is told as its first chunk, with the rows of all of them.
template <class Room, class Run>
void for_units(const Chunks& chunks, int64_t most, Room room, Run f) {
  const int64_t count = chunks.count();
  if (count == 0) return;
  const int64_t T = chunks.rows(), threads = torch::stable::get_num_threads();
  const int64_t wanted = threads * ((count + threads * most - 1) / (threads * most));
  const int64_t rows = (count + wanted - 1) / wanted * kChunkRows, units = (T + rows - 1) / rows;
  torch::stable::parallel_for(0, chunks.samples() * units, 1, [&](int64_t begin, int64_t end) {
    const Aligned memory(room(rows));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / units, first = i % units * rows;
      f(Chunk{sample * chunks.per_sample() + first / kChunkRows, sample, sample * T + first, std::min(rows, T - first)},
        memory.data);
    }
  });
}

}  // namespace
}  // namespace difffit
