// frozen_mlp: the tanh form of GELU between fc1 and fc2, and its backward with fc1's bias gradient.
//
//     g = u·(1 + tanh z)/2,  z = sqrt(2/pi)·(u + 0.044715·u³);     du = dg·g'(u),  db = sum_m du
//
// Bytes: forward reads u and writes g; backward reads dg, u and writes du. db sums the float32 values before rounding,
// by chunk (ops.h). These are the only kernels here that arithmetic limits rather than memory: see elementary.h.
//
// With a bias (B, N), one for each of B samples, u is the bare product: g = gelu(u + bias), du = dg·g'(u + bias), and db
// (B, N) is the sum over each sample's rows.
//
// mlp_forward and mlp_backward make both products as well (products.h says for which dtypes). The weights are laid out in panels at each call, of
// which M·16 multiplications an element make little; then every thread takes some rows through fc1, GELU and fc2, 256
// hidden channels at a time: g, dg and du stay in the second-level cache and are never in memory. 4·M·D·F operations each
// way; of bytes, forward h, both weights, u and branch, backward dbranch, both weights, u and dh.
#include "ops.h"

#include <optional>
#include <type_traits>
#include <utility>

#define DIFFFIT_KERNELS "frozen_mlp_kernels.h"
#define DIFFFIT_DOT_KERNELS "frozen_mlp_kernels.h"
#include "foreach_isa.h"
#include "products.h"

namespace difffit {
namespace {

// How many of `rows` rows are each sample's, by its (samples, N) biases, which are checked.
int64_t rows_of_each(const char* op, const char* name, const Tensor& bias, int64_t rows, int64_t N) {
  const int64_t samples = bias.size(0);
  check_vector(op, name, bias, {samples, N});
  STD_TORCH_CHECK(samples ? rows % samples == 0 : rows == 0, op, ": ", name, " must be one for each sample; got ", samples,
                  " for ", rows, " rows");
  return samples ? rows / samples : 0;
}

// Chunks of the rows of each sample where each has its bias, else of all rows.
Chunks chunks_by_sample(const char* op, const std::optional<Tensor>& bias, int64_t M, int64_t N) {
  if (!bias) return Chunks(1, M, N);
  check(op, "bias", *bias, 2, true);
  return Chunks(bias->size(0), rows_of_each(op, "bias", *bias, M, N), N);
}

Tensor sums_by_sample(const Tensor& like, const std::optional<Tensor>& bias, int64_t N) {
  return bias ? empty(like, {bias->size(0), N}) : empty(like, {N});
}

Tensor gelu_forward(const Tensor& u, const std::optional<Tensor>& bias) {
  const char* op = "gelu_forward";
  check(op, "u", u, 2);
  const int64_t M = u.size(0), N = u.size(1), total = M * N;
  const Chunks chunks = chunks_by_sample(op, bias, M, N);
  Tensor g = empty(u, {M, N}, u.scalar_type());
  dispatch(u.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const T* pu = in<T>(u);
    T* pg = out<T>(g);
    if (bias) {
      const auto kernel = DIFFFIT_PICK(gelu_bias_forward_chunk<T>);
      const float* pbias = in<float>(*bias);
      chunks.run([&](const Chunk& k) { kernel(pu + k.row * N, pbias + k.sample * N, pg + k.row * N, k.rows, N); });
      return;
    }
    const auto kernel = DIFFFIT_PICK(gelu_forward_chunk<T>);
    torch::stable::parallel_for(0, (total + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
      kernel(pu + begin * kGrain, pg + begin * kGrain, std::min(end * kGrain, total) - begin * kGrain);
    });
  });
  return g;
}

std::tuple<Tensor, Tensor> gelu_backward(const Tensor& dg, const Tensor& u, const std::optional<Tensor>& bias) {
  const char* op = "gelu_backward";
  check(op, "u", u, 2);
  const int64_t M = u.size(0), N = u.size(1);
  check_shape(op, "dg", dg, {M, N});
  check_same_dtype(op, "dg", dg, "u", u);
  const Chunks chunks = chunks_by_sample(op, bias, M, N);
  Tensor du = empty(u, {M, N}, u.scalar_type()), db = sums_by_sample(u, bias, N);
  const Partials partials(chunks, 1, N);
  dispatch(u.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = bias ? DIFFFIT_PICK(gelu_backward_chunk<true, T>) : DIFFFIT_PICK(gelu_backward_chunk<false, T>);
    const float* pbias = bias ? in<float>(*bias) : nullptr;
    const T *pdg = in<T>(dg), *pu = in<T>(u);
    T* pdu = out<T>(du);
    chunks.run([&](const Chunk& k) {
      kernel(pdg + k.row * N, pu + k.row * N, bias ? pbias + k.sample * N : nullptr, pdu + k.row * N, partials.of(k),
             k.rows, N);
    });
  });
  partials.reduce(DIFFFIT_PICK(sum_partials), {db});
  return {du, db};
}

// -- in one operation ------------------------------------------------------------------------------------------------
// At most, in a unit, so that what it keeps fits the second-level cache: 256 rows, or 128, which keep more.
template <class E>
constexpr int64_t kUnitChunks = std::is_same_v<E, float> ? 8 : 4;

// The sizes, checked. The kernels work on whole vectors: D and F must be multiples of kGranule.
struct MlpSizes {
  int64_t M, D, F;

  MlpSizes(const char* op, const char* name, const Tensor& rows, const Tensor& w1, const Tensor& w2) : M(rows.size(0)) {
    check_multiplies(op, name, rows);
    check(op, "w1", w1, 2);
    check_same_dtype(op, "w1", w1, name, rows);
    D = w1.size(1), F = w1.size(0);
    check_shape(op, "w2", w2, {D, F});
    check_same_dtype(op, "w2", w2, name, rows);
    STD_TORCH_CHECK(D % kGranule == 0 && F % kGranule == 0 && D > 0 && F > 0, op, ": the sizes of w1 must be multiples of ",
                    kGranule, "; got ", shape(w1));
  }
};

std::tuple<Tensor, Tensor> mlp_forward(const Tensor& h, const Tensor& w1, const Tensor& b1, const Tensor& w2) {
  const char* op = "mlp_forward";
  check(op, "h", h, 2);
  const MlpSizes s(op, "h", h, w1, w2);
  check_shape(op, "h", h, {s.M, s.D});
  const bool each = b1.dim() == 2;
  if (!each) check_vector(op, "b1", b1, {s.F});
  const Chunks chunks = each ? Chunks(b1.size(0), rows_of_each(op, "b1", b1, s.M, s.F), s.F) : Chunks(1, s.M, s.F);
  Tensor branch = empty(h, {s.M, s.D}, h.scalar_type()), u = empty(h, {s.M, s.F}, h.scalar_type());
  dispatch_multiplied(h, [&](auto t) {
    using E = typename decltype(t)::type;
    const Aligned p1 = packed<E>(w1, true), p2 = packed<E>(w2, true);
    const auto kernel = each ? DIFFFIT_PICK_FOR(E, mlp_forward_rows<E, true>) : DIFFFIT_PICK_FOR(E, mlp_forward_rows<E, false>);
    const auto room = DIFFFIT_PICK_FOR(E, mlp_room<E>);
    const E* ph = in<E>(h);
    const float* pb = in<float>(b1);
    E *pu = out<E>(u), *pbranch = out<E>(branch);
    for_units(chunks, kUnitChunks<E>, [&](int64_t rows) { return room(rows, s.D); }, [&](const Chunk& k, float* memory) {
      kernel(ph + k.row * s.D, p1.data, pb + k.sample * s.F, p2.data, pu + k.row * s.F, pbranch + k.row * s.D, memory,
             k.rows, s.D, s.F);
    });
  });
  return {branch, u};
}

std::tuple<Tensor, Tensor> mlp_backward(const Tensor& dbranch, const Tensor& w1, const Tensor& w2, const Tensor& u,
                                        bool need_dh, const std::optional<Tensor>& bias) {
  const char* op = "mlp_backward";
  check(op, "u", u, 2);
  const MlpSizes s(op, "u", u, w1, w2);
  check_shape(op, "u", u, {s.M, s.F});
  check_shape(op, "dbranch", dbranch, {s.M, s.D});
  check_same_dtype(op, "dbranch", dbranch, "u", u);
  const Chunks chunks = chunks_by_sample(op, bias, s.M, s.F);
  Tensor dh = empty(u, {need_dh ? s.M : 0, s.D}, u.scalar_type()), db = sums_by_sample(u, bias, s.F);
  const Partials partials(chunks, 1, s.F);
  dispatch_multiplied(u, [&](auto t) {
    using E = typename decltype(t)::type;
    const Aligned p1 = need_dh ? packed<E>(w1, false) : Aligned(0), p2 = packed<E>(w2, false);
    const auto kernel = bias ? DIFFFIT_PICK_FOR(E, mlp_backward_rows<E, true>) : DIFFFIT_PICK_FOR(E, mlp_backward_rows<E, false>);
    const auto room = DIFFFIT_PICK_FOR(E, mlp_room<E>);
    const E *pd = in<E>(dbranch), *pu = in<E>(u);
    const float* pbias = bias ? in<float>(*bias) : nullptr;
    E* pdh = need_dh ? out<E>(dh) : nullptr;
    for_units(chunks, kUnitChunks<E>, [&](int64_t rows) { return room(rows, s.D); }, [&](const Chunk& k, float* memory) {
      kernel(pd + k.row * s.D, p1.data, p2.data, pu + k.row * s.F, bias ? pbias + k.sample * s.F : nullptr,
             pdh ? pdh + k.row * s.D : nullptr, partials.of(k), memory, k.rows, s.D, s.F);
    });
  });
  partials.reduce(DIFFFIT_PICK(sum_partials), {db});
  return {dh, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def("gelu_forward(Tensor u, Tensor? bias=None) -> Tensor");
  m.def("gelu_backward(Tensor dg, Tensor u, Tensor? bias=None) -> (Tensor, Tensor)");
  m.def("mlp_forward(Tensor h, Tensor w1, Tensor b1, Tensor w2) -> (Tensor, Tensor)");
  m.def(
      "mlp_backward(Tensor dbranch, Tensor w1, Tensor w2, Tensor u, bool need_dh, Tensor? bias=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("gelu_forward", TORCH_BOX(&gelu_forward));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
  m.impl("mlp_forward", TORCH_BOX(&mlp_forward));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
}

}  // namespace difffit
