// attention: softmax(q·kᵀ/√d)·v over the tokens of each sample, from the bare product z of qkv; both directions.
//
//     S = d^-1/2·sum_c g_c·(z_q + b)_c·z_k,c     P = softmax(S)     o = gamma_v·(P·z_v)     lse = log sum exp(S)
//     P = exp(S - lse)    dP = (gamma_v·do)·z_vT    dS = P·(dP - delta)    delta = sum_c do·o
//     A = d^-1/2·dS·z_k   dz_q = g·A   dz_k = dST·(d^-1/2·g·(z_q + b))   dz_v = gamma_v·(PT·do)
//     db = sum dz_q       dg = sum A·(z_q + b)                           dgamma_v = sum (PT·do)·z_v
//
// Nothing is divided by a factor, and no probabilities are kept. The unit of work is one head of one sample: its
// packed queries, keys and values and a block of its scores stay in the second-level cache, so of main memory only z,
// o, do and dz are touched, and the products (matmul_kernels.h) take nearly all of the time: 2 of 2·T·T·d operations
// forward, 5 backward. Where there are fewer heads than two for each thread, a unit is a range of queries (forward) or
// keys (backward); what blocks of keys add to dz_q is then kept apart and added in their order, as within one unit:
// the bits are the same. The vectors' gradients are summed by block of kKeyRows tokens, then over blocks and samples
// in order.
//
// Products are float32, for bfloat16 too, which is widened as it is packed; but where the processor multiplies bfloat16 as
// it is (avx512_bf16), that is what a product takes (attention_dot_kernels.h): twice as fast, and rounded as in any
// attention that computes in bfloat16.
#include "attention.h"

#include <cmath>
#include <type_traits>

namespace difffit {

// One head of one sample. Row t of z is at z + 3·D·t: the d channels of the query, D further those of the key, 2·D
// further those of the value. bias, factor, value_factor are the head's entries of the vectors; null stands for ones.
template <class T>
struct Head {
  const T* z;
  const float *bias, *factor, *value_factor;
  int64_t tokens, d, D;
  float scale;  // d^-1/2
};

constexpr int64_t kKeyRows = 64;  // keys of a block, backward

}  // namespace difffit

#define DIFFFIT_KERNELS "attention_kernels.h"
#define DIFFFIT_DOT_KERNELS "attention_dot_kernels.h"
#include "foreach_isa.h"

namespace difffit {
namespace {

// -- in one operation ------------------------------------------------------------------------------------------------
// The sizes of z and vectors, checked.
struct Sizes {
  int64_t B, T, D, heads, d, G, R;

  Sizes(const char* op, const Tensor& z, const Tensor& vectors, int64_t num_heads) : heads(num_heads) {
    check(op, "z", z, 3);
    STD_TORCH_CHECK(heads >= 1, op, ": num_heads must be at least 1; got ", heads);
    STD_TORCH_CHECK(z.size(2) > 0 && z.size(2) % (3 * heads) == 0, op, ": the last size of z must be a multiple of 3·",
                    heads, "; got shape ", shape(z));
    B = z.size(0), T = z.size(1), D = z.size(2) / 3, d = D / heads;
    check(op, "vectors", vectors, 3, true);
    G = vectors.size(0), R = vectors.size(1);
    STD_TORCH_CHECK((G == 1 || G == B) && (R == 1 || R == 3) && vectors.size(2) == D, op,
                    ": vectors must have shape (1 or ", B, ", 1 or 3, ", D, "); got ", shape(vectors));
  }

  int64_t units() const { return B * heads; }

  // Into how many parts a head is cut that has `blocks` of them.
  int64_t parts(int64_t blocks) const {
    const int64_t wanted = 2 * static_cast<int64_t>(torch::stable::get_num_threads());
    return units() >= wanted ? 1 : std::min(blocks, (wanted + units() - 1) / units());
  }

  template <class E>
  Head<E> head(const Tensor& z, const Tensor& vectors, int64_t unit) const {
    const int64_t b = unit / heads, column = unit % heads * d;
    const float* v = in<float>(vectors) + (G == 1 ? 0 : b * R * D) + column;
    return {in<E>(z) + b * T * 3 * D + column, v, R == 3 ? v + D : nullptr, R == 3 ? v + 2 * D : nullptr, T, d, D,
            1.0f / std::sqrt(static_cast<float>(d))};
  }

  // Where the head's first channel is in the sample's first row of a (B, T, n·D).
  int64_t at(int64_t unit, int64_t n) const { return unit / heads * T * n * D + unit % heads * d; }
};

// The kernels for this processor, and the floats of memory that they want, of (tokens, d).
template <class E>
struct Kernels {
  int64_t (*forward_room)(int64_t, int64_t) = DIFFFIT_PICK(attention_forward_room);
  void (*forward)(const Head<E>&, E*, float*, int64_t, int64_t, float*) = DIFFFIT_PICK(attention_forward_queries<E>);
  int64_t (*backward_room)(int64_t, int64_t) = DIFFFIT_PICK(attention_backward_room);
  void (*head)(const Head<E>&, const E*, const E*, const float*, E*, float*, float*) = DIFFFIT_PICK(attention_backward_head<E>);
  void (*keys)(const Head<E>&, const E*, const E*, const float*, E*, float*, float*, int64_t, int64_t,
               float*) = DIFFFIT_PICK(attention_backward_keys<E>);
  void (*queries)(const Head<E>&, const float*, int64_t, int64_t, E*, float*) = DIFFFIT_PICK(attention_backward_queries<E>);
  int64_t (*slice)(int64_t, int64_t) = DIFFFIT_PICK(attention_slice);
};

template <class E>
Kernels<E> kernels() {
#ifdef DIFFFIT_X86
  if constexpr (std::is_same_v<E, bf16>) {
    if (isa() == Isa::avx512_bf16) {
      return {&avx512_bf16::dot_forward_room,   &avx512_bf16::dot_forward_queries, &avx512_bf16::dot_backward_room,
              &avx512_bf16::dot_backward_head,  &avx512_bf16::dot_backward_keys,   &avx512_bf16::attention_backward_queries<E>,
              &avx512_bf16::attention_slice};
    }
  }
#endif
  return {};
}

// Runs f(unit, part, memory) for all of them, with `room` floats of memory on a cache line.
template <class F>
void for_units(int64_t units, int64_t parts, int64_t room, F f) {
  torch::stable::parallel_for(0, units * parts, 1, [&](int64_t begin, int64_t end) {
    const Aligned memory(room);
    for (int64_t i = begin; i < end; ++i) f(i / parts, i % parts, memory.data);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const Tensor& z, const Tensor& vectors, int64_t num_heads) {
  const Sizes s("attention_forward", z, vectors, num_heads);
  Tensor o = empty(z, {s.B, s.T, s.D}, z.scalar_type()), lse = empty(z, {s.B, s.heads, s.T});
  if (s.B * s.T == 0) return {o, lse};
  dispatch(z.scalar_type(), [&](auto t) {
    using E = typename decltype(t)::type;
    const Kernels<E> kernel = kernels<E>();
    E* po = out<E>(o);
    float* plse = out<float>(lse);
    const int64_t blocks = (s.T + kKeyRows - 1) / kKeyRows, parts = s.parts(blocks);
    for_units(s.units(), parts, kernel.forward_room(s.T, s.d), [&](int64_t u, int64_t p, float* memory) {
      kernel.forward(s.head<E>(z, vectors, u), po + s.at(u, 1), plse + u * s.T, s.T * p / parts, s.T * (p + 1) / parts,
                     memory);
    });
  });
  return {o, lse};
}

std::tuple<Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& z, const Tensor& vectors,
                                              const Tensor& o, const Tensor& lse, int64_t num_heads) {
  const char* op = "attention_backward";
  const Sizes s(op, z, vectors, num_heads);
  check_shape(op, "do", dout, {s.B, s.T, s.D});
  check_same_dtype(op, "do", dout, "z", z);
  check_shape(op, "o", o, {s.B, s.T, s.D});
  check_same_dtype(op, "o", o, "z", z);
  check_vector(op, "lse", lse, {s.B, s.heads, s.T});
  Tensor dz = empty(z, {s.B, s.T, 3 * s.D}, z.scalar_type()), dvectors = empty(z, {s.G, s.R, s.D});
  float* totals = out<float>(dvectors);
  if (s.B * s.T == 0) {
    std::fill_n(totals, s.G * s.R * s.D, 0.0f);
    return {dz, dvectors};
  }
  const int64_t blocks = (s.T + kKeyRows - 1) / kKeyRows, parts = s.parts(blocks);
  const std::unique_ptr<float[]> sums(new float[s.B * blocks * 3 * s.D]);  // of b, g, gamma_v by block of tokens
  dispatch(z.scalar_type(), [&](auto t) {
    using E = typename decltype(t)::type;
    const E *pd = in<E>(dout), *po = in<E>(o);
    const float* plse = in<float>(lse);
    E* pz = out<E>(dz);
    const auto sums_of = [&](int64_t u) { return sums.get() + u / s.heads * blocks * 3 * s.D + u % s.heads * s.d; };
    const Kernels<E> kernel = kernels<E>();
    const int64_t room = kernel.backward_room(s.T, s.d);
    if (parts == 1) {
      for_units(s.units(), 1, room, [&](int64_t u, int64_t, float* memory) {
        kernel.head(s.head<E>(z, vectors, u), pd + s.at(u, 1), po + s.at(u, 1), plse + u * s.T, pz + s.at(u, 3),
                    sums_of(u), memory);
      });
      return;
    }
    const int64_t slice = kernel.slice(s.T, s.d);
    const std::unique_ptr<float[]> slices(new float[s.units() * blocks * slice]);
    for_units(s.units(), parts, room, [&](int64_t u, int64_t p, float* memory) {
      kernel.keys(s.head<E>(z, vectors, u), pd + s.at(u, 1), po + s.at(u, 1), plse + u * s.T, pz + s.at(u, 3), sums_of(u),
                  slices.get() + u * blocks * slice, blocks * p / parts, blocks * (p + 1) / parts, memory);
    });
    for_units(s.units(), 1, 0, [&](int64_t u, int64_t, float*) {
      kernel.queries(s.head<E>(z, vectors, u), slices.get() + u * blocks * slice, slice, blocks, pz + s.at(u, 3),
                     sums_of(u));
    });
  });
  const auto sum = DIFFFIT_PICK(sum_partials);
  const int64_t count = s.B / s.G * blocks;
  for (int64_t i = 0; i < s.G * s.R; ++i) {
    sum(sums.get() + (i / s.R * count * 3 + i % s.R) * s.D, count, 3 * s.D, totals + i * s.D, s.D);
  }
  return {dz, dvectors};
}

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def("attention_forward(Tensor z, Tensor vectors, int num_heads) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor do, Tensor z, Tensor vectors, Tensor o, Tensor lse, int num_heads)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace difffit
