// colsum: the sum over the rows of a matrix, out_n = sum_m x_mn in float32: what a bias gradient is.
//
// Bytes: reads x. Sums are kept by chunk (ops.h).
#include "colsum.h"

#define DIFFFIT_KERNELS "colsum_kernels.h"
#include "foreach_isa.h"

namespace difffit {

Tensor sum_columns(const Tensor& x, int64_t N) {
  const int64_t M = x.size(0), stride = x.size(1);
  Tensor total = empty(x, {N});
  const Chunks chunks(1, M, N);
  const Partials partials(chunks, 1, N);
  dispatch(x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = DIFFFIT_PICK(colsum_chunk<T>);
    const T* px = in<T>(x);
    chunks.run([&](const Chunk& k) { kernel(px + k.row * stride, stride, partials.of(k), k.rows, N); });
  });
  partials.reduce(DIFFFIT_PICK(sum_partials), {total});
  return total;
}

namespace {

Tensor colsum(const Tensor& x) {
  check("colsum", "x", x, 2);
  return sum_columns(x, x.size(1));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) { m.def("colsum(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) { m.impl("colsum", TORCH_BOX(&colsum)); }

}  // namespace difffit
