// modulation: scale, shift, gate and bias of every joint from the one modulation product, forward and backward.
//
//     forward   scale <- w·(1 + scale), shift <- shift + v·(1 + scale), gate <- gamma·gate, bias = gate·beta
//     backward  the gradients of m (B, 3J + 2, D) and, summed over the samples in order, of bias, w, v, gamma, beta
//
// A work item owns one branch and walks over the samples, so every sum has one owner. Rows 3j to 3j + 2 of m are shift,
// scale and gate of branch j, the last two shift and scale of the end; planes 4j to 4j + 3 of the vectors are scale, shift,
// gate and bias. Bytes: m and the vectors once each way.
#include <cstring>

#include "ops.h"

#define DIFFFIT_KERNELS "modulation_kernels.h"
#include "foreach_isa.h"

namespace difffit {
namespace {

struct Sizes {
  int64_t B, R, J, D;
};

Sizes check_modulation(const char* op, const Tensor& m, const Tensor& bias, const std::optional<Tensor>& norm,
                       const std::optional<Tensor>& gamma, const Tensor& beta) {
  check(op, "m", m, 3);
  const int64_t B = m.size(0), R = m.size(1), D = m.size(2), J = R / 3;
  STD_TORCH_CHECK(R % 3 == 2, op, ": m must have 3·branches + 2 rows; got shape ", shape(m));
  check_vector(op, "bias", bias, {R, D});
  check_vector(op, "beta", beta, {J, D});
  if (norm) check_vector(op, "norm", *norm, {J + 1, 2, D});
  if (gamma) check_vector(op, "gamma", *gamma, {J, D});
  return {B, R, J, D};
}

const float* or_null(const std::optional<Tensor>& t) { return t ? in<float>(*t) : nullptr; }

float* at(float* p, int64_t offset) { return p == nullptr ? nullptr : p + offset; }
const float* at(const float* p, int64_t offset) { return p == nullptr ? nullptr : p + offset; }

template <class F>
void each_branch(const Sizes& s, F f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, 8 * s.B * s.D));
  torch::stable::parallel_for(0, s.J + 1, grain, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) f(j);
  });
}

Tensor modulation_forward(const Tensor& m, const Tensor& bias, const std::optional<Tensor>& norm,
                          const std::optional<Tensor>& gamma, const Tensor& beta) {
  const Sizes s = check_modulation("modulation_forward", m, bias, norm, gamma, beta);
  const int64_t D = s.D, plane = s.B * D;
  Tensor vectors = empty(m, {4 * s.J + 2, s.B, D});
  dispatch(m.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = DIFFFIT_PICK(modulation_forward_row<T>);
    const T* pm = in<T>(m);
    const float *pbias = in<float>(bias), *pnorm = or_null(norm), *pgamma = or_null(gamma), *pbeta = in<float>(beta);
    float* pv = out<float>(vectors);
    each_branch(s, [&](int64_t j) {
      const bool branch = j < s.J;
      float* scale = pv + 4 * j * plane;
      float* gate = branch ? scale + 2 * plane : nullptr;
      for (int64_t b = 0; b < s.B; ++b) {
        kernel(pm + (b * s.R + 3 * j) * D, pbias + 3 * j * D, at(pnorm, 2 * j * D), branch ? at(pgamma, j * D) : nullptr,
               branch ? pbeta + j * D : nullptr, scale + b * D, scale + plane + b * D, at(gate, b * D),
               at(gate, plane + b * D), D);
      }
    });
  });
  return vectors;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulation_backward(
    const Tensor& dvectors, const Tensor& m, const Tensor& bias, const std::optional<Tensor>& norm,
    const std::optional<Tensor>& gamma, const Tensor& beta) {
  const char* op = "modulation_backward";
  const Sizes s = check_modulation(op, m, bias, norm, gamma, beta);
  const int64_t D = s.D, plane = s.B * D;
  check_vector(op, "dvectors", dvectors, {4 * s.J + 2, s.B, D});
  Tensor dm = empty(m, {s.B, s.R, D}, m.scalar_type()), dbias = empty(m, {s.R, D}), dbeta = empty(m, {s.J, D});
  Tensor dnorm = norm ? empty(m, {s.J + 1, 2, D}) : empty(m, {0}), dgamma = gamma ? empty(m, {s.J, D}) : empty(m, {0});
  for (const Tensor& sum : {dbias, dnorm, dgamma, dbeta}) {
    std::fill_n(out<float>(sum), sum.numel(), 0.0f);  // of none there is no pointer
  }
  dispatch(m.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = DIFFFIT_PICK(modulation_backward_row<T>);
    const T* pm = in<T>(m);
    T* pdm = out<T>(dm);
    const float *pbias = in<float>(bias), *pnorm = or_null(norm), *pgamma = or_null(gamma), *pbeta = in<float>(beta);
    const float* pv = in<float>(dvectors);
    float *pdbias = out<float>(dbias), *pdbeta = out<float>(dbeta);
    float *pdnorm = norm ? out<float>(dnorm) : nullptr, *pdgamma = gamma ? out<float>(dgamma) : nullptr;
    each_branch(s, [&](int64_t j) {
      const bool branch = j < s.J;
      const float* dscale = pv + 4 * j * plane;
      const float* dgate = branch ? dscale + 2 * plane : nullptr;
      for (int64_t b = 0; b < s.B; ++b) {
        kernel(dscale + b * D, dscale + plane + b * D, at(dgate, b * D), at(dgate, plane + b * D),
               pm + (b * s.R + 3 * j) * D, pbias + 3 * j * D, at(pnorm, 2 * j * D),
               branch ? at(pgamma, j * D) : nullptr, branch ? pbeta + j * D : nullptr, pdm + (b * s.R + 3 * j) * D,
               pdbias + 3 * j * D, at(pdnorm, 2 * j * D), branch ? at(pdgamma, j * D) : nullptr,
               branch ? pdbeta + j * D : nullptr, D);
      }
    });
  });
  return {dm, dbias, dnorm, dgamma, dbeta};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def("modulation_forward(Tensor m, Tensor bias, Tensor? norm, Tensor? gamma, Tensor beta) -> Tensor");
  m.def(
      "modulation_backward(Tensor dvectors, Tensor m, Tensor bias, Tensor? norm, Tensor? gamma, Tensor beta)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("modulation_forward", TORCH_BOX(&modulation_forward));
  m.impl("modulation_backward", TORCH_BOX(&modulation_backward));
}

}  // namespace difffit
