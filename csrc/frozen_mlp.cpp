// frozen_mlp: the tanh form of GELU between fc1 and fc2, and its backward with fc1's bias gradient.
//
//     g = u·(1 + tanh z)/2,  z = sqrt(2/pi)·(u + 0.044715·u³);     du = dg·g'(u),  db = sum_m du
//
// Bytes: forward reads u and writes g; backward reads dg, u and writes du. db sums the float32 values before rounding,
// by chunk (ops.h). These are the only kernels here that arithmetic limits rather than memory: see elementary.h.
#include "ops.h"

#define DIFFFIT_KERNELS "frozen_mlp_kernels.h"
#include "foreach_isa.h"

namespace difffit {
namespace {

Tensor gelu_forward(const Tensor& u) {
  check("gelu_forward", "u", u, 2);
  const int64_t M = u.size(0), N = u.size(1), total = M * N;
  Tensor g = empty(u, {M, N}, u.scalar_type());
  dispatch(u.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = DIFFFIT_PICK(gelu_forward_chunk<T>);
    const T* pu = in<T>(u);
    T* pg = out<T>(g);
    torch::stable::parallel_for(0, (total + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
      kernel(pu + begin * kGrain, pg + begin * kGrain, std::min(end * kGrain, total) - begin * kGrain);
    });
  });
  return g;
}

std::tuple<Tensor, Tensor> gelu_backward(const Tensor& dg, const Tensor& u) {
  const char* op = "gelu_backward";
  check(op, "u", u, 2);
  const int64_t M = u.size(0), N = u.size(1);
  check_shape(op, "dg", dg, {M, N});
  check_same_dtype(op, "dg", dg, "u", u);
  Tensor du = empty(u, {M, N}, u.scalar_type()), db = empty(u, {N});
  const Chunks chunks(1, M, N);
  const Partials partials(chunks, 1, N);
  dispatch(u.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = DIFFFIT_PICK(gelu_backward_chunk<T>);
    const T *pdg = in<T>(dg), *pu = in<T>(u);
    T* pdu = out<T>(du);
    chunks.run([&](const Chunk& k) {
      kernel(pdg + k.row * N, pu + k.row * N, pdu + k.row * N, partials.of(k), k.rows, N);
    });
  });
  partials.reduce(DIFFFIT_PICK(sum_partials), {db});
  return {du, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def("gelu_forward(Tensor u) -> Tensor");
  m.def("gelu_backward(Tensor dg, Tensor u) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("gelu_forward", TORCH_BOX(&gelu_forward));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}

}  // namespace difffit
