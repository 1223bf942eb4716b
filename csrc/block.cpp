// block: a transformer block with frozen weights; what difffit_fast/ops/block.py puts together of the other operations, here in
// three passes each way.
//
//     z = h·qkvᵀ          o = attention(z)          branch1 = o·projᵀ
//     y1, h1 = join(x, branch1)    branch2 = mlp(h1)    y2, h2 = join(y1, branch2)       join: residual_adaln
//
// All but the attention works on rows. So a thread takes some rows of a sample from the attention's output to the next
// block's input, or back, in its second-level cache: in memory are x, what is saved for the backward (z, o, branch1, y1, u,
// branch2, y2) and the results. The same kernels in the same order as in the single operations, hence the same numbers, but
// for the products with qkv and proj, which are those of matmul_kernels.h. The weights are laid out in panels at each call.
#include "ops.h"

#include "attention.h"

#include <optional>
#include <type_traits>

namespace difffit {

struct Join {
  const float *gate, *bias, *scale, *shift;  // (B, D)
  float *mean, *rstd;                        // (B, T)
};

template <class X, class H>
struct BlockForward {
  const X* x;
  const H* o;
  const float *proj, *fc1, *fc2, *bias1;  // weights in panels
  Join join1, join2;
  X *y1, *y2;
  H *branch1, *u, *branch2, *h2;
  int64_t D, F;
  float eps;
};

template <class X, class H>
struct BlockBackward {
  const X *dy, *y1, *y2;  // dy may be null
  const H *dh, *branch1, *u, *branch2;
  const float *proj, *fc1, *fc2, *bias1;
  Join join1, join2;
  X* dx;
  H* dout;                       // of the attention's output
  float *sums1, *sums2, *dbias1;  // of each chunk: (4, D), (4, D), (F)
  int64_t D, F;
};

}  // namespace difffit

#define DIFFFIT_KERNELS "block_kernels.h"
#define DIFFFIT_DOT_KERNELS "block_kernels.h"
#include "foreach_isa.h"
#include "products.h"

namespace difffit {
namespace {

// The sizes, checked.
struct BlockSizes {
  int64_t B, T, D, F, M;

  BlockSizes(const char* op, const Tensor& h, const Tensor& qkv, const Tensor& proj, const Tensor& fc1, const Tensor& fc2) {
    check(op, "h", h, 3);
    check_multiplies(op, "h", h);
    B = h.size(0), T = h.size(1), D = h.size(2), M = B * T;
    check(op, "fc1", fc1, 2);
    F = fc1.size(0);
    check_shape(op, "fc1", fc1, {F, D});
    check_shape(op, "qkv", qkv, {3 * D, D});
    check_shape(op, "proj", proj, {D, D});
    check_shape(op, "fc2", fc2, {D, F});
    check_same_dtype(op, "qkv", qkv, "h", h);
    check_same_dtype(op, "proj", proj, "h", h);
    check_same_dtype(op, "fc1", fc1, "h", h);
    check_same_dtype(op, "fc2", fc2, "h", h);
    STD_TORCH_CHECK(D % kGranule == 0 && F % kGranule == 0 && D > 0 && F > 0, op, ": the sizes of fc1 must be multiples of ",
                    kGranule, "; got ", shape(fc1));
  }

  void check_like(const char* op, const char* name, const Tensor& t, const char* other, const Tensor& like) const {
    check_shape(op, name, t, {B, T, D});
    check_same_dtype(op, name, t, other, like);
  }

  void check_bias(const char* op, const Tensor& bias) const {
    if (bias.dim() == 2) {
      check_vector(op, "bias1", bias, {B, F});
    } else {
      check_vector(op, "bias1", bias, {F});
    }
  }
};

// joint (4, B, D): gate, bias, scale, shift.
Join join_of(const Tensor& joint, const Tensor& mean, const Tensor& rstd, int64_t vectors) {
  const float* v = in<float>(joint);
  return {v, v + vectors, v + 2 * vectors, v + 3 * vectors, out<float>(mean), out<float>(rstd)};
}

// Chunks in a unit: what fits most of a second-level cache of 1 MB, but enough for the weights' sake.
constexpr int64_t kUnitBytes = 768 * 1024, kLeastChunks = 3, kMostChunks = 8;

template <class Room>
int64_t unit_chunks(Room room, int64_t D) {
  const int64_t chunk = room(kChunkRows, D) * static_cast<int64_t>(sizeof(float));
  return std::min(kMostChunks, std::max(kLeastChunks, kUnitBytes / chunk));
}

// y (M, n) = x (M, k) times a weight, or its transpose.
template <class E>
void product(const E* x, const Tensor& w, bool transposed, E* y, int64_t M, int64_t n, int64_t k) {
  const Aligned panels = packed<E>(w, transposed);
  const auto kernel = DIFFFIT_PICK_FOR(E, product_rows<E>);
  const auto room = [&](int64_t rows) { return std::is_same_v<E, float> ? 0 : rows * n; };
  for_units(Chunks(1, M, n), 4, room, [&](const Chunk& c, float* memory) {
    kernel(x + c.row * k, panels.data, y + c.row * n, memory, c.rows, n, k);
  });
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// y2, h2, z, o, lse, branch1, y1, mean1, rstd1, u, branch2, mean2, rstd2.
Forward block_forward(const Tensor& x, const Tensor& h, const Tensor& qkv, const Tensor& proj, const Tensor& fc1,
                      const Tensor& fc2, const Tensor& vectors, const Tensor& bias1, const Tensor& joint1,
                      const Tensor& joint2, int64_t num_heads, double eps) {
  const char* op = "block_forward";
  const BlockSizes s(op, h, qkv, proj, fc1, fc2);
  check_shape(op, "x", x, {s.B, s.T, s.D});
  s.check_bias(op, bias1);
  check_vector(op, "joint1", joint1, {4, s.B, s.D});
  check_vector(op, "joint2", joint2, {4, s.B, s.D});
  const ScalarType stream = x.scalar_type(), type = h.scalar_type();
  Tensor z = empty(h, {s.B, s.T, 3 * s.D}, type), u = empty(h, {s.M, s.F}, type);
  Tensor branch1 = empty(h, {s.B, s.T, s.D}, type), branch2 = empty(h, {s.B, s.T, s.D}, type);
  Tensor h2 = empty(h, {s.B, s.T, s.D}, type), y1 = empty(h, {s.B, s.T, s.D}, stream), y2 = empty(h, {s.B, s.T, s.D}, stream);
  Tensor mean1 = empty(h, {s.B, s.T}), rstd1 = empty(h, {s.B, s.T}), mean2 = empty(h, {s.B, s.T}), rstd2 = empty(h, {s.B, s.T});
  dispatch_multiplied(h, [&](auto t) {
    using H = typename decltype(t)::type;
    product(in<H>(h), qkv, true, out<H>(z), s.M, 3 * s.D, s.D);
  });
  const auto [o, lse] = attention_forward(z, vectors, num_heads);
  dispatch(stream, [&](auto tx) {
    using X = typename decltype(tx)::type;
    dispatch_multiplied(h, [&](auto th) {
      using H = typename decltype(th)::type;
      const Aligned p = packed<H>(proj, true), p1 = packed<H>(fc1, true), p2 = packed<H>(fc2, true);
      const BlockForward<X, H> a{in<X>(x), in<H>(o), p.data, p1.data, p2.data, in<float>(bias1),
                                 join_of(joint1, mean1, rstd1, s.B * s.D), join_of(joint2, mean2, rstd2, s.B * s.D),
                                 out<X>(y1), out<X>(y2), out<H>(branch1), out<H>(u), out<H>(branch2), out<H>(h2),
                                 s.D, s.F, static_cast<float>(eps)};
      const auto kernel = bias1.dim() == 2 ? DIFFFIT_PICK_FOR(H, block_forward_rows<X, H, true>)
                                           : DIFFFIT_PICK_FOR(H, block_forward_rows<X, H, false>);
      const auto room = DIFFFIT_PICK_FOR(H, block_room<X, H>);
      for_units(Chunks(s.B, s.T, s.D), unit_chunks(room, s.D), [&](int64_t rows) { return room(rows, s.D); },
                [&](const Chunk& k, float* memory) { kernel(a, k, memory); });
    });
  });
  return {y2, h2, z, o, lse, branch1, y1, mean1, rstd1, u, branch2, mean2, rstd2};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// dx, dh (empty where it is not needed), dvectors, dbias1, djoint1, djoint2. `bias1`: of each sample, where u is without it.
Backward block_backward(const std::optional<Tensor>& dy, const Tensor& dh, const Tensor& qkv, const Tensor& proj,
                        const Tensor& fc1, const Tensor& fc2, const Tensor& vectors, const Tensor& joint1,
                        const Tensor& joint2, const Tensor& z, const Tensor& o, const Tensor& lse, const Tensor& branch1,
                        const Tensor& y1, const Tensor& mean1, const Tensor& rstd1, const Tensor& u, const Tensor& branch2,
                        const Tensor& y2, const Tensor& mean2, const Tensor& rstd2, int64_t num_heads, bool need_dh,
                        const std::optional<Tensor>& bias1) {
  const char* op = "block_backward";
  const BlockSizes s(op, dh, qkv, proj, fc1, fc2);
  check_shape(op, "y1", y1, {s.B, s.T, s.D});
  s.check_like(op, "y2", y2, "y1", y1);
  if (dy) s.check_like(op, "dy", *dy, "y1", y1);
  s.check_like(op, "branch1", branch1, "dh", dh);
  s.check_like(op, "branch2", branch2, "dh", dh);
  check_shape(op, "z", z, {s.B, s.T, 3 * s.D});
  check_same_dtype(op, "z", z, "dh", dh);
  check_shape(op, "u", u, {s.M, s.F});
  check_same_dtype(op, "u", u, "dh", dh);
  for (const Tensor* t : {&mean1, &rstd1, &mean2, &rstd2}) check_vector(op, "mean and rstd", *t, {s.B, s.T});
  check_vector(op, "joint1", joint1, {4, s.B, s.D});
  check_vector(op, "joint2", joint2, {4, s.B, s.D});
  if (bias1) check_vector(op, "bias1", *bias1, {s.B, s.F});
  const ScalarType type = dh.scalar_type();
  Tensor dx = empty(dh, {s.B, s.T, s.D}, y1.scalar_type()), dout = empty(dh, {s.B, s.T, s.D}, type);
  Tensor djoint1 = empty(dh, {4, s.B, s.D}), djoint2 = empty(dh, {4, s.B, s.D});
  Tensor dbias1 = bias1 ? empty(dh, {s.B, s.F}) : empty(dh, {s.F});
  const Chunks chunks(s.B, s.T, s.D);
  // A bias for all samples is summed over the chunks of all, which are those of one sample of B·T rows only if T is whole
  // chunks; its sums are kept by sample and added in their order.
  const Partials sums1(chunks, 4, s.D), sums2(chunks, 4, s.D), biases(chunks, 1, s.F);
  dispatch(y1.scalar_type(), [&](auto tx) {
    using X = typename decltype(tx)::type;
    dispatch_multiplied(dh, [&](auto th) {
      using H = typename decltype(th)::type;
      const Aligned p = packed<H>(proj, false), p1 = packed<H>(fc1, false), p2 = packed<H>(fc2, false);
      const BlockBackward<X, H> a{dy ? in<X>(*dy) : nullptr, in<X>(y1), in<X>(y2), in<H>(dh), in<H>(branch1), in<H>(u),
                                  in<H>(branch2), p.data, p1.data, p2.data, bias1 ? in<float>(*bias1) : nullptr,
                                  join_of(joint1, mean1, rstd1, s.B * s.D), join_of(joint2, mean2, rstd2, s.B * s.D),
                                  out<X>(dx), out<H>(dout), sums1.data(), sums2.data(), biases.data(), s.D, s.F};
      const auto kernel = bias1 ? dy ? DIFFFIT_PICK_FOR(H, block_backward_rows<X, H, true, true>)
                                     : DIFFFIT_PICK_FOR(H, block_backward_rows<X, H, true, false>)
                          : dy  ? DIFFFIT_PICK_FOR(H, block_backward_rows<X, H, false, true>)
                                : DIFFFIT_PICK_FOR(H, block_backward_rows<X, H, false, false>);
      const auto room = DIFFFIT_PICK_FOR(H, block_room<X, H>);
      for_units(chunks, unit_chunks(room, s.D), [&](int64_t rows) { return room(rows, s.D); },
                [&](const Chunk& k, float* memory) { kernel(a, k, memory); });
    });
  });
  const auto sum = DIFFFIT_PICK(sum_partials);
  sums1.reduce(sum, djoint1);
  sums2.reduce(sum, djoint2);
  if (bias1) {
    biases.reduce(sum, {dbias1});
  } else {
    biases.reduce_all(sum, dbias1);
  }
  const auto [dz, dvectors] = attention_backward(dout, z, vectors, o, lse, num_heads);
  Tensor dh_in = empty(dh, {need_dh ? s.B : 0, s.T, s.D}, type);
  if (need_dh) {
    const Tensor& gradient = dz;
    dispatch_multiplied(dh, [&](auto t) {
      using H = typename decltype(t)::type;
      product(in<H>(gradient), qkv, false, out<H>(dh_in), s.M, s.D, 3 * s.D);
    });
  }
  return {dx, dh_in, dvectors, dbias1, djoint1, djoint2};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def(
      "block_forward(Tensor x, Tensor h, Tensor qkv, Tensor proj, Tensor fc1, Tensor fc2, Tensor vectors, Tensor bias1,"
      " Tensor joint1, Tensor joint2, int num_heads, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
      " Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "block_backward(Tensor? dy, Tensor dh, Tensor qkv, Tensor proj, Tensor fc1, Tensor fc2, Tensor vectors, Tensor joint1,"
      " Tensor joint2, Tensor z, Tensor o, Tensor lse, Tensor branch1, Tensor y1, Tensor mean1, Tensor rstd1, Tensor u,"
      " Tensor branch2, Tensor y2, Tensor mean2, Tensor rstd2, int num_heads, bool need_dh, Tensor? bias1=None)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("block_forward", TORCH_BOX(&block_forward));
  m.impl("block_backward", TORCH_BOX(&block_backward));
}

}  // namespace difffit
