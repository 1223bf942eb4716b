// adaln: h = xhat·scale + shift, xhat = LayerNorm(x) without parameters; scale, shift one vector per sample.
//
// Bytes: forward reads x and writes h; backward reads dh and x and writes dx. The statistics and the second look at a
// row come from the first-level cache. dscale = sum_t dh·xhat and dshift = sum_t dh are summed by chunk (ops.h).
#include "ops.h"

#define DIFFFIT_KERNELS "adaln_kernels.h"
#include "foreach_isa.h"

namespace difffit {
namespace {

std::tuple<Tensor, Tensor, Tensor> adaln_forward(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps,
                                                 ScalarType out_dtype) {
  const char* op = "adaln_forward";
  check(op, "x", x, 3);
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  check_vector(op, "scale", scale, {B, D});
  check_vector(op, "shift", shift, {B, D});
  STD_TORCH_CHECK(out_dtype == ScalarType::Float || out_dtype == ScalarType::BFloat16, op,
                  ": out_dtype must be float32 or bfloat16; got ", torch::headeronly::toString(out_dtype));
  Tensor h = empty(x, {B, T, D}, out_dtype), mean = empty(x, {B, T}), rstd = empty(x, {B, T});
  dispatch(x.scalar_type(), out_dtype, [&](auto tx, auto th) {
    using X = typename decltype(tx)::type;
    using H = typename decltype(th)::type;
    const auto kernel = DIFFFIT_PICK(adaln_forward_chunk<X, H>);
    const X* px = in<X>(x);
    const float *pscale = in<float>(scale), *pshift = in<float>(shift);
    H* ph = out<H>(h);
    float *pmean = out<float>(mean), *prstd = out<float>(rstd);
    Chunks(B, T, D).run([&](const Chunk& k) {
      kernel(px + k.row * D, pscale + k.sample * D, pshift + k.sample * D, static_cast<float>(eps), ph + k.row * D,
             pmean + k.row, prstd + k.row, k.rows, D);
    });
  });
  return {h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> adaln_backward(const Tensor& dh, const Tensor& x, const Tensor& scale,
                                                  const Tensor& mean, const Tensor& rstd) {
  const char* op = "adaln_backward";
  check(op, "x", x, 3);
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  check_shape(op, "dh", dh, {B, T, D});
  check_vector(op, "scale", scale, {B, D});
  check_vector(op, "mean", mean, {B, T});
  check_vector(op, "rstd", rstd, {B, T});
  Tensor dx = empty(x, {B, T, D}, x.scalar_type()), dscale = empty(x, {B, D}), dshift = empty(x, {B, D});
  const Chunks chunks(B, T, D);
  const Partials partials(chunks, 2, D);
  dispatch(x.scalar_type(), dh.scalar_type(), [&](auto tx, auto th) {
    using X = typename decltype(tx)::type;
    using H = typename decltype(th)::type;
    const auto kernel = DIFFFIT_PICK(adaln_backward_chunk<X, H>);
    const H* pdh = in<H>(dh);
    const X* px = in<X>(x);
    const float *pscale = in<float>(scale), *pmean = in<float>(mean), *prstd = in<float>(rstd);
    X* pdx = out<X>(dx);
    chunks.run([&](const Chunk& k) {
      kernel(pdh + k.row * D, px + k.row * D, pscale + k.sample * D, pmean + k.row, prstd + k.row, pdx + k.row * D,
             partials.of(k), k.rows, D);
    });
  });
  partials.reduce(DIFFFIT_PICK(sum_partials), {dscale, dshift});
  return {dx, dscale, dshift};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def(
      "adaln_forward(Tensor x, Tensor scale, Tensor shift, float eps, ScalarType out_dtype) -> (Tensor, Tensor, "
      "Tensor)");
  m.def("adaln_backward(Tensor dh, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("adaln_forward", TORCH_BOX(&adaln_forward));
  m.impl("adaln_backward", TORCH_BOX(&adaln_backward));
}

}  // namespace difffit
