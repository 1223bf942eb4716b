// residual: y = x + gate·branch + bias, the end of a branch; residual_adaln: the same and h = LayerNorm(y)·scale + shift
// in one pass. gate, bias, scale, shift are one vector per sample.
//
// Bytes: residual reads x, branch and writes y, its backward reads dy, branch and writes dbranch (dx = dy is not copied).
// residual_adaln reads x, branch and writes y, h; its backward reads dh, dy, y, branch and writes dx, dbranch. The four
// vector sums (dgate = sum_t g·branch, dbias = sum_t g, dscale = sum_t dh·yhat, dshift = sum_t dh) fall out of the same
// pass, by chunk (ops.h).
#include "ops.h"

#define DIFFFIT_KERNELS "residual_kernels.h"
#include "foreach_isa.h"

namespace difffit {
namespace {

Tensor residual_forward(const Tensor& x, const Tensor& branch, const Tensor& gate, const Tensor& bias) {
  const char* op = "residual_forward";
  check(op, "x", x, 3);
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  check_shape(op, "branch", branch, {B, T, D});
  check_vector(op, "gate", gate, {B, D});
  check_vector(op, "bias", bias, {B, D});
  Tensor y = empty(x, {B, T, D}, x.scalar_type());
  dispatch(x.scalar_type(), branch.scalar_type(), [&](auto tx, auto th) {
    using X = typename decltype(tx)::type;
    using H = typename decltype(th)::type;
    const auto kernel = DIFFFIT_PICK(residual_forward_chunk<X, H>);
    const X* px = in<X>(x);
    const H* pbranch = in<H>(branch);
    const float *pgate = in<float>(gate), *pbias = in<float>(bias);
    X* py = out<X>(y);
    Chunks(B, T, D).run([&](const Chunk& k) {
      kernel(px + k.row * D, pbranch + k.row * D, pgate + k.sample * D, pbias + k.sample * D, py + k.row * D, k.rows,
             D);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> residual_backward(const Tensor& dy, const Tensor& branch, const Tensor& gate) {
  const char* op = "residual_backward";
  check(op, "dy", dy, 3);
  const int64_t B = dy.size(0), T = dy.size(1), D = dy.size(2);
  check_shape(op, "branch", branch, {B, T, D});
  check_vector(op, "gate", gate, {B, D});
  Tensor dbranch = empty(branch, {B, T, D}, branch.scalar_type()), dgate = empty(branch, {B, D}),
         dbias = empty(branch, {B, D});
  const Chunks chunks(B, T, D);
  const Partials partials(chunks, 2, D);
  dispatch(dy.scalar_type(), branch.scalar_type(), [&](auto tx, auto th) {
    using X = typename decltype(tx)::type;
    using H = typename decltype(th)::type;
    const auto kernel = DIFFFIT_PICK(residual_backward_chunk<X, H>);
    const X* pdy = in<X>(dy);
    const H* pbranch = in<H>(branch);
    const float* pgate = in<float>(gate);
    H* pdbranch = out<H>(dbranch);
    chunks.run([&](const Chunk& k) {
      kernel(pdy + k.row * D, pbranch + k.row * D, pgate + k.sample * D, pdbranch + k.row * D, partials.of(k), k.rows,
             D);
    });
  });
  partials.reduce(DIFFFIT_PICK(sum_partials), {dgate, dbias});
  return {dbranch, dgate, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_adaln_forward(const Tensor& x, const Tensor& branch,
                                                                  const Tensor& gate, const Tensor& bias,
                                                                  const Tensor& scale, const Tensor& shift,
                                                                  double eps) {
  const char* op = "residual_adaln_forward";
  check(op, "x", x, 3);
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  check_shape(op, "branch", branch, {B, T, D});
  check_vector(op, "gate", gate, {B, D});
  check_vector(op, "bias", bias, {B, D});
  check_vector(op, "scale", scale, {B, D});
  check_vector(op, "shift", shift, {B, D});
  Tensor y = empty(x, {B, T, D}, x.scalar_type()), h = empty(x, {B, T, D}, branch.scalar_type());
  Tensor mean = empty(x, {B, T}), rstd = empty(x, {B, T});
  dispatch(x.scalar_type(), branch.scalar_type(), [&](auto tx, auto th) {
    using X = typename decltype(tx)::type;
    using H = typename decltype(th)::type;
    const auto kernel = DIFFFIT_PICK(residual_adaln_forward_chunk<X, H>);
    const X* px = in<X>(x);
    const H* pbranch = in<H>(branch);
    const float *pgate = in<float>(gate), *pbias = in<float>(bias), *pscale = in<float>(scale),
                *pshift = in<float>(shift);
    X* py = out<X>(y);
    H* ph = out<H>(h);
    float *pmean = out<float>(mean), *prstd = out<float>(rstd);
    Chunks(B, T, D).run([&](const Chunk& k) {
      const int64_t v = k.sample * D, at = k.row * D;
      kernel(px + at, pbranch + at, pgate + v, pbias + v, pscale + v, pshift + v, static_cast<float>(eps), py + at,
             ph + at, pmean + k.row, prstd + k.row, k.rows, D);
    });
  });
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> residual_adaln_backward(const Tensor& dh, const std::optional<Tensor>& dy,
                                                           const Tensor& y, const Tensor& branch, const Tensor& gate,
                                                           const Tensor& scale, const Tensor& mean,
                                                           const Tensor& rstd) {
  const char* op = "residual_adaln_backward";
  check(op, "y", y, 3);
  const int64_t B = y.size(0), T = y.size(1), D = y.size(2);
  check_shape(op, "dh", dh, {B, T, D});
  check_shape(op, "branch", branch, {B, T, D});
  check_same_dtype(op, "dh", dh, "branch", branch);
  if (dy) {
    check_shape(op, "dy", *dy, {B, T, D});
    check_same_dtype(op, "dy", *dy, "y", y);
  }
  check_vector(op, "gate", gate, {B, D});
  check_vector(op, "scale", scale, {B, D});
  check_vector(op, "mean", mean, {B, T});
  check_vector(op, "rstd", rstd, {B, T});
  Tensor dx = empty(y, {B, T, D}, y.scalar_type()), dbranch = empty(y, {B, T, D}, branch.scalar_type());
  Tensor sums = empty(y, {4, B, D});
  const Chunks chunks(B, T, D);
  const Partials partials(chunks, 4, D);
  dispatch(y.scalar_type(), branch.scalar_type(), [&](auto tx, auto th) {
    using X = typename decltype(tx)::type;
    using H = typename decltype(th)::type;
    const auto kernel = dy ? DIFFFIT_PICK(residual_adaln_backward_chunk<true, X, H>)
                           : DIFFFIT_PICK(residual_adaln_backward_chunk<false, X, H>);
    const H *pdh = in<H>(dh), *pbranch = in<H>(branch);
    const X *pdy = in<X>(dy ? *dy : y), *py = in<X>(y);
    const float *pgate = in<float>(gate), *pscale = in<float>(scale), *pmean = in<float>(mean),
                *prstd = in<float>(rstd);
    X* pdx = out<X>(dx);
    H* pdbranch = out<H>(dbranch);
    chunks.run([&](const Chunk& k) {
      const int64_t v = k.sample * D, at = k.row * D;
      kernel(pdh + at, pdy + at, py + at, pbranch + at, pgate + v, pscale + v, pmean + k.row, prstd + k.row, pdx + at,
             pdbranch + at, partials.of(k), k.rows, D);
    });
  });
  partials.reduce(DIFFFIT_PICK(sum_partials), sums);
  return {dx, dbranch, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def("residual_forward(Tensor x, Tensor branch, Tensor gate, Tensor bias) -> Tensor");
  m.def("residual_backward(Tensor dy, Tensor branch, Tensor gate) -> (Tensor, Tensor, Tensor)");
  m.def(
      "residual_adaln_forward(Tensor x, Tensor branch, Tensor gate, Tensor bias, Tensor scale, Tensor shift, float eps)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_adaln_backward(Tensor dh, Tensor? dy, Tensor y, Tensor branch, Tensor gate, Tensor scale, Tensor mean,"
      " Tensor rstd) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("residual_forward", TORCH_BOX(&residual_forward));
  m.impl("residual_backward", TORCH_BOX(&residual_backward));
  m.impl("residual_adaln_forward", TORCH_BOX(&residual_adaln_forward));
  m.impl("residual_adaln_backward", TORCH_BOX(&residual_adaln_backward));
}

}  // namespace difffit
