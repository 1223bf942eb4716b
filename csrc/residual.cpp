// residual: y = x + s·f + r, the end of a branch; residual_adaln: the same and h = LayerNorm(y)·a + c in one pass.
// s, r, a, c are one vector per sample.
//
// Bytes: residual reads x, f and writes y, its backward reads dy, f and writes df (dx = dy is not copied).
// residual_adaln reads x, f and writes y, h; its backward reads dh, dy, y, f and writes dx, df. The four vector sums
// (ds = sum_t g·f, dr = sum_t g, da = sum_t dh·yhat, dc = sum_t dh) fall out of the same pass, by chunk (ops.h).
#include "ops.h"

#define DIFFFIT_KERNELS "residual_kernels.h"
#include "foreach_isa.h"

namespace difffit {
namespace {

Tensor residual_forward(const Tensor& x, const Tensor& f, const Tensor& s, const Tensor& r) {
  const char* op = "residual_forward";
  check(op, "x", x, 3);
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  check_shape(op, "f", f, {B, T, D});
  check_vector(op, "s", s, {B, D});
  check_vector(op, "r", r, {B, D});
  Tensor y = empty(x, {B, T, D}, x.scalar_type());
  dispatch(x.scalar_type(), f.scalar_type(), [&](auto tx, auto th) {
    using X = typename decltype(tx)::type;
    using H = typename decltype(th)::type;
    const auto kernel = DIFFFIT_PICK(residual_forward_chunk<X, H>);
    const X* px = in<X>(x);
    const H* pf = in<H>(f);
    const float *ps = in<float>(s), *pr = in<float>(r);
    X* py = out<X>(y);
    Chunks(B, T, D).run([&](const Chunk& k) {
      kernel(px + k.row * D, pf + k.row * D, ps + k.sample * D, pr + k.sample * D, py + k.row * D, k.rows, D);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> residual_backward(const Tensor& dy, const Tensor& f, const Tensor& s) {
  const char* op = "residual_backward";
  check(op, "dy", dy, 3);
  const int64_t B = dy.size(0), T = dy.size(1), D = dy.size(2);
  check_shape(op, "f", f, {B, T, D});
  check_vector(op, "s", s, {B, D});
  Tensor df = empty(f, {B, T, D}, f.scalar_type()), ds = empty(f, {B, D}), dr = empty(f, {B, D});
  const Chunks chunks(B, T, D);
  const Partials partials(chunks, 2, D);
  dispatch(dy.scalar_type(), f.scalar_type(), [&](auto tx, auto th) {
    using X = typename decltype(tx)::type;
    using H = typename decltype(th)::type;
    const auto kernel = DIFFFIT_PICK(residual_backward_chunk<X, H>);
    const X* pdy = in<X>(dy);
    const H* pf = in<H>(f);
    const float* ps = in<float>(s);
    H* pdf = out<H>(df);
    chunks.run([&](const Chunk& k) {
      kernel(pdy + k.row * D, pf + k.row * D, ps + k.sample * D, pdf + k.row * D, partials.of(k), k.rows, D);
    });
  });
  partials.reduce(DIFFFIT_PICK(sum_partials), {ds, dr});
  return {df, ds, dr};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_adaln_forward(const Tensor& x, const Tensor& f, const Tensor& s,
                                                                  const Tensor& r, const Tensor& a, const Tensor& c,
                                                                  double eps) {
  const char* op = "residual_adaln_forward";
  check(op, "x", x, 3);
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  check_shape(op, "f", f, {B, T, D});
  check_vector(op, "s", s, {B, D});
  check_vector(op, "r", r, {B, D});
  check_vector(op, "a", a, {B, D});
  check_vector(op, "c", c, {B, D});
  Tensor y = empty(x, {B, T, D}, x.scalar_type()), h = empty(x, {B, T, D}, f.scalar_type());
  Tensor mean = empty(x, {B, T}), rstd = empty(x, {B, T});
  dispatch(x.scalar_type(), f.scalar_type(), [&](auto tx, auto th) {
    using X = typename decltype(tx)::type;
    using H = typename decltype(th)::type;
    const auto kernel = DIFFFIT_PICK(residual_adaln_forward_chunk<X, H>);
    const X* px = in<X>(x);
    const H* pf = in<H>(f);
    const float *ps = in<float>(s), *pr = in<float>(r), *pa = in<float>(a), *pc = in<float>(c);
    X* py = out<X>(y);
    H* ph = out<H>(h);
    float *pm = out<float>(mean), *pq = out<float>(rstd);
    Chunks(B, T, D).run([&](const Chunk& k) {
      const int64_t v = k.sample * D, at = k.row * D;
      kernel(px + at, pf + at, ps + v, pr + v, pa + v, pc + v, static_cast<float>(eps), py + at, ph + at, pm + k.row,
             pq + k.row, k.rows, D);
    });
  });
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_adaln_backward(
    const Tensor& dh, const std::optional<Tensor>& dy, const Tensor& y, const Tensor& f, const Tensor& s,
    const Tensor& a, const Tensor& mean, const Tensor& rstd) {
  const char* op = "residual_adaln_backward";
  check(op, "y", y, 3);
  const int64_t B = y.size(0), T = y.size(1), D = y.size(2);
  check_shape(op, "dh", dh, {B, T, D});
  check_shape(op, "f", f, {B, T, D});
  check_same_dtype(op, "dh", dh, "f", f);
  if (dy) {
    check_shape(op, "dy", *dy, {B, T, D});
    check_same_dtype(op, "dy", *dy, "y", y);
  }
  check_vector(op, "s", s, {B, D});
  check_vector(op, "a", a, {B, D});
  check_vector(op, "mean", mean, {B, T});
  check_vector(op, "rstd", rstd, {B, T});
  Tensor dx = empty(y, {B, T, D}, y.scalar_type()), df = empty(y, {B, T, D}, f.scalar_type());
  Tensor ds = empty(y, {B, D}), dr = empty(y, {B, D}), da = empty(y, {B, D}), dc = empty(y, {B, D});
  const Chunks chunks(B, T, D);
  const Partials partials(chunks, 4, D);
  dispatch(y.scalar_type(), f.scalar_type(), [&](auto tx, auto th) {
    using X = typename decltype(tx)::type;
    using H = typename decltype(th)::type;
    const auto kernel = dy ? DIFFFIT_PICK(residual_adaln_backward_chunk<true, X, H>)
                           : DIFFFIT_PICK(residual_adaln_backward_chunk<false, X, H>);
    const H *pdh = in<H>(dh), *pf = in<H>(f);
    const X *pdy = in<X>(dy ? *dy : y), *py = in<X>(y);
    const float *ps = in<float>(s), *pa = in<float>(a), *pm = in<float>(mean), *pq = in<float>(rstd);
    X* pdx = out<X>(dx);
    H* pdf = out<H>(df);
    chunks.run([&](const Chunk& k) {
      const int64_t v = k.sample * D, at = k.row * D;
      kernel(pdh + at, pdy + at, py + at, pf + at, ps + v, pa + v, pm + k.row, pq + k.row, pdx + at, pdf + at,
             partials.of(k), k.rows, D);
    });
  });
  partials.reduce(DIFFFIT_PICK(sum_partials), {ds, dr, da, dc});
  return {dx, df, ds, dr, da, dc};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def("residual_forward(Tensor x, Tensor f, Tensor s, Tensor r) -> Tensor");
  m.def("residual_backward(Tensor dy, Tensor f, Tensor s) -> (Tensor, Tensor, Tensor)");
  m.def(
      "residual_adaln_forward(Tensor x, Tensor f, Tensor s, Tensor r, Tensor a, Tensor c, float eps)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_adaln_backward(Tensor dh, Tensor? dy, Tensor y, Tensor f, Tensor s, Tensor a, Tensor mean, Tensor rstd)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("residual_forward", TORCH_BOX(&residual_forward));
  m.impl("residual_backward", TORCH_BOX(&residual_backward));
  m.impl("residual_adaln_forward", TORCH_BOX(&residual_adaln_forward));
  m.impl("residual_adaln_backward", TORCH_BOX(&residual_adaln_backward));
}

}  // namespace difffit
