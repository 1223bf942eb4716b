// eight_bit: rows in int8 with a scale for each, rotated before or not, and what becomes of the int8 product.
//
// Bytes: quantize_int8 reads x and writes one byte for each value; a row and what it is rotated into stay in the first-level
// cache. rescale reads a product of 4 bytes and writes y.
#include "ops.h"

#define DIFFFIT_KERNELS "eight_bit_kernels.h"
#include "foreach_isa.h"

namespace difffit {
namespace {

int64_t block_of(int64_t channels) {
  for (int64_t block : {64, 16, 4}) {
    if (channels % block == 0) return block;
  }
  return 1;
}

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& x, bool turn) {
  check("quantize_int8", "x", x, 2);
  const int64_t M = x.size(0), K = x.size(1), block = turn ? block_of(K) : 1;
  Tensor q = empty(x, {M, K}, ScalarType::Char), scale = empty(x, {M});
  dispatch(x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = DIFFFIT_PICK(quantize_chunk<T>);
    const T* px = in<T>(x);
    int8_t* pq = out<int8_t>(q);
    float* pscale = out<float>(scale);
    Chunks(1, M, K).run([&](const Chunk& k) {
      const Aligned row((K + kGranule - 1) / kGranule * kGranule);
      kernel(px + k.row * K, block, row.data, pq + k.row * K, pscale + k.row, k.rows, K);
    });
  });
  return {q, scale};
}

Tensor rescale(const Tensor& product, const Tensor& row, const Tensor& column, std::optional<Tensor> bias,
               ScalarType dtype) {
  const char* op = "rescale";
  STD_TORCH_CHECK(product.is_cpu() && product.dim() == 2 && product.is_contiguous(), op,
                  ": product must be a contiguous matrix on the CPU; got shape ", shape(product));
  const ScalarType type = product.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Int, op, ": product must be float32 or int32; got ",
                  torch::headeronly::toString(type));
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": dtype must be float32 or bfloat16; got ", torch::headeronly::toString(dtype));
  const int64_t M = product.size(0), N = product.size(1);
  check_vector(op, "row", row, {M});
  check_vector(op, "column", column, {N});
  if (bias) check_shape(op, "bias", *bias, {N});
  Tensor y = empty(product, {M, N}, dtype);
  const float *prow = in<float>(row), *pcolumn = in<float>(column);
  dispatch(dtype, bias ? bias->scalar_type() : ScalarType::Float, [&](auto ty, auto tb) {
    using Y = typename decltype(ty)::type;
    using B = typename decltype(tb)::type;
    const B* pbias = bias ? in<B>(*bias) : nullptr;
    Y* py = out<Y>(y);
    const auto run = [&](const auto* p, auto kernel) {
      Chunks(1, M, N).run([&](const Chunk& k) {
        kernel(p + k.row * N, prow + k.row, pcolumn, pbias, py + k.row * N, k.rows, N);
      });
    };
    if (type == ScalarType::Int) {
      run(in<int32_t>(product), DIFFFIT_PICK(rescale_chunk<int32_t, B, Y>));
    } else {
      run(in<float>(product), DIFFFIT_PICK(rescale_chunk<float, B, Y>));
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(difffit_fast_cpp, m) {
  m.def("quantize_int8(Tensor x, bool turn) -> (Tensor, Tensor)");
  m.def("rescale(Tensor product, Tensor row, Tensor column, Tensor? bias, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(difffit_fast_cpp, CPU, m) {
  m.impl("quantize_int8", TORCH_BOX(&quantize_int8));
  m.impl("rescale", TORCH_BOX(&rescale));
}

}  // namespace difffit
