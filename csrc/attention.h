// attention.cpp's two directions, for other operations of the host side.
#pragma once

#include "ops.h"

namespace difffit {

// o (B, T, D) and lse (B, heads, T) of z (B, T, 3·D).
std::tuple<Tensor, Tensor> attention_forward(const Tensor& z, const Tensor& vectors, int64_t num_heads);

// dz and dvectors.
std::tuple<Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& z, const Tensor& vectors, const Tensor& o,
                                              const Tensor& lse, int64_t num_heads);

}  // namespace difffit
