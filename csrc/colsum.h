// What other operations use of colsum.cpp.
#pragma once

#include "ops.h"

namespace difffit {

// The sums over rows of the first N columns of a contiguous matrix, float32 (N). The caller has checked x.
Tensor sum_columns(const Tensor& x, int64_t N);

}  // namespace difffit
