// frozen_qkv: what gamma and the query bias do to the projection q, k, v, forward and backward.
//
//     qkv_scale     q <- gamma_q·(q + bias_q), k <- gamma_k·k, v <- gamma_v·v, in place
//     qkv_backward  dz = gamma·dqkv, dbias_q = gamma_q·sum_m dq, dgamma = (sum_m dqkv·qkv)/gamma, qkv as scaled
//
// sum_m dk·k equals sum_m dq·q per channel (both are the diagonal of qT·dS·k), so the keys need no reduction.
// Bytes: qkv_scale reads and writes qkv; qkv_backward reads dqkv and two thirds of qkv and writes dz, or only reads dq
// when there is no gamma. Sums are kept by chunk (ops.h).
#include "colsum.h"

#define DIFFFIT_KERNELS "frozen_qkv_kernels.h"
#include "foreach_isa.h"

namespace difffit {
namespace {

int64_t third(const char* op, const char* name, const Tensor& qkv) {
  check(op, name, qkv, 2);
  STD_TORCH_CHECK(qkv.size(1) % 3 == 0, op, ": ", name, " must have a multiple of 3 columns; got shape ", shape(qkv));
  return qkv.size(1) / 3;
}

void qkv_scale(const Tensor& qkv, const Tensor& gamma, const Tensor& bias_q) {
  const char* op = "qkv_scale";
  const int64_t M = qkv.dim() > 0 ? qkv.size(0) : 0, D = third(op, "qkv", qkv);
  check_vector(op, "gamma", gamma, {3 * D});
  check_vector(op, "bias_q", bias_q, {D});
  dispatch(qkv.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = DIFFFIT_PICK(qkv_scale_chunk<T>);
    T* p = out<T>(qkv);
    const float *pg = in<float>(gamma), *pb = in<float>(bias_q);
    Chunks(1, M, 3 * D).run([&](const Chunk& k) { kernel(p + k.row * 3 * D, pg, pb, k.rows, D); });
  });
}

std::tuple<Tensor, Tensor, Tensor> qkv_backward(const Tensor& dqkv, const std::optional<Tensor>& qkv,
                                                const std::optional<Tensor>& gamma) {
  const char* op = "qkv_backward";
  const int64_t D = third(op, "dqkv", dqkv), M = dqkv.size(0);
  STD_TORCH_CHECK(qkv.has_value() == gamma.has_value(), op, ": qkv and gamma must both be given, or neither; got ",
                  qkv ? "only qkv" : "only gamma");
  if (!gamma) return {dqkv, sum_columns(dqkv, D), empty(dqkv, {0})};
  check_shape(op, "qkv", *qkv, {M, 3 * D});
  check_same_dtype(op, "qkv", *qkv, "dqkv", dqkv);
  check_vector(op, "gamma", *gamma, {3 * D});
  Tensor dz = empty(dqkv, {M, 3 * D}, dqkv.scalar_type());
  Tensor dbias_q = empty(dqkv, {D}), dots_q = empty(dqkv, {D}), dots_v = empty(dqkv, {D}), dgamma = empty(dqkv, {3 * D});
  const Chunks chunks(1, M, 3 * D);
  const Partials partials(chunks, 3, D);
  dispatch(dqkv.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = DIFFFIT_PICK(qkv_backward_chunk<T>);
    const T *pd = in<T>(dqkv), *py = in<T>(*qkv);
    const float* pg = in<float>(*gamma);
    T* pz = out<T>(dz);
    chunks.run([&](const Chunk& k) {
      kernel(pd + k.row * 3 * D, py + k.row * 3 * D, pg, pz + k.row * 3 * D, partials.of(k), k.rows, D);
    });
  });
  partials.reduce(DIFFFIT_PICK(sum_partials), {dbias_q, dots_q, dots_v});
  const float *pg = in<float>(*gamma), *dq_q = in<float>(dots_q), *dv_v = in<float>(dots_v);
  float *pb = out<float>(dbias_q), *pdg = out<float>(dgamma);
  for (int64_t d = 0; d < D; ++d) {
    pb[d] *= pg[d];
    pdg[d] = dq_q[d] / pg[d];
    pdg[D + d] = dq_q[d] / pg[D + d];
    pdg[2 * D + d] = dv_v[d] / pg[2 * D + d];
  }
  return {dz, dbias_q, dgamma};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def("qkv_scale(Tensor(a!) qkv, Tensor gamma, Tensor bias_q) -> ()");
  m.def("qkv_backward(Tensor(a) dqkv, Tensor? qkv, Tensor? gamma) -> (Tensor(a), Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("qkv_scale", TORCH_BOX(&qkv_scale));
  m.impl("qkv_backward", TORCH_BOX(&qkv_backward));
}

}  // namespace difffit
