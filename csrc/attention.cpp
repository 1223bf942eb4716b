// attention: the softmax between the batched matrix products of the CPU path, both directions in place.
//
//     forward   p = softmax(scale·scores)        over the last dimension
//     backward  dp <- scale·p·(dp - sum_j dp·p)
//
// Bytes: forward reads and writes the scores, backward reads dp, p and writes dp. A row stays in the first-level cache
// between its maximum, its sum and its scaling. There is no sum across rows.
#include "ops.h"

#define DIFFFIT_KERNELS "attention_kernels.h"
#include "foreach_isa.h"

namespace difffit {
namespace {

int64_t row_grain(int64_t S) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, S)); }

void softmax_forward(const Tensor& scores, double scale) {
  check("softmax_forward", "scores", scores, 3);
  const int64_t rows = scores.size(0) * scores.size(1), S = scores.size(2);
  dispatch(scores.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = DIFFFIT_PICK(softmax_forward_rows<T>);
    T* p = out<T>(scores);
    torch::stable::parallel_for(0, rows, row_grain(S), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> room(new float[S]);
      kernel(p + begin * S, static_cast<float>(scale), room.get(), end - begin, S);
    });
  });
}

void softmax_backward(const Tensor& dp, const Tensor& p, double scale) {
  const char* op = "softmax_backward";
  check(op, "dp", dp, 3);
  check_shape(op, "p", p, {dp.size(0), dp.size(1), dp.size(2)});
  const int64_t rows = dp.size(0) * dp.size(1), S = dp.size(2);
  dispatch(dp.scalar_type(), p.scalar_type(), [&](auto tg, auto tp) {
    using G = typename decltype(tg)::type;
    using T = typename decltype(tp)::type;
    const auto kernel = DIFFFIT_PICK(softmax_backward_rows<G, T>);
    G* pd = out<G>(dp);
    const T* pp = in<T>(p);
    torch::stable::parallel_for(0, rows, row_grain(S), [&](int64_t begin, int64_t end) {
      kernel(pd + begin * S, pp + begin * S, static_cast<float>(scale), end - begin, S);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def("softmax_forward(Tensor(a!) scores, float scale) -> ()");
  m.def("softmax_backward(Tensor(a!) dp, Tensor p, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("softmax_forward", TORCH_BOX(&softmax_forward));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
}

}  // namespace difffit
