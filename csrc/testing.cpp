// For the tests alone: what an operation would return that forgot to write its output or its partial sums.
#include "ops.h"

#define DIFFFIT_KERNELS "colsum_kernels.h"
#include "foreach_isa.h"

namespace difffit {
namespace {

// Allocated as the operations allocate, and not written: an output (N), and the total (N) of the partial sums of `x`.
std::tuple<Tensor, Tensor> unwritten(const Tensor& x) {
  check("unwritten", "x", x, 2);
  const int64_t M = x.size(0), N = x.size(1);
  Tensor total = empty(x, {N});
  const Partials partials(Chunks(1, M, N), 1, N);
  partials.reduce(DIFFFIT_PICK(sum_partials), {total});
  return {empty(x, {N}), total};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) { m.def("unwritten(Tensor x) -> (Tensor, Tensor)"); }

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) { m.impl("unwritten", TORCH_BOX(&unwritten)); }

}  // namespace difffit
