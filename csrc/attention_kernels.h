// Rows of attention.cpp; included once for each instruction set.
#include "elementary.h"

namespace difffit::DF_ISA {

// softmax(scale·x) for R rows of S in place; `e` is room for S floats. sign·x has its maximum subtracted before it is
// scaled: the difference is never positive, so nothing overflows.
template <int R, class T>
DF_INLINE void softmax_forward_few(T* x, float scale, float* e, int64_t S) {
  const float sign = scale < 0.0f ? -1.0f : 1.0f, size = scale < 0.0f ? -scale : scale;
  vf top[R];
  for (int r = 0; r < R; ++r) top[r] = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + W <= S; i += W) {
    for (int r = 0; r < R; ++r) top[r] = max_or(load(x + r * S + i, Full{}) * sign, top[r]);
  }
  for (int r = 0; r < R; ++r) {
    float largest = fold_max(top[r]);
    for (int64_t j = i; j < S; ++j) {
      const vf v = load(x + r * S + j, Part{1}) * sign;
      largest = v[0] > largest ? v[0] : largest;
    }
    vf sum = {};
    each(S, [&](int64_t j, auto lanes) DF_LAMBDA {
      const vf v = exp_nonpositive((load(x + r * S + j, lanes) * sign - largest) * size);
      store(e + j, v, lanes);
      sum += keep(v, lanes);
    });
    const float inverse = 1.0f / fold_sum(sum);
    each(S, [&](int64_t j, auto lanes) DF_LAMBDA { store(x + r * S + j, load(e + j, lanes) * inverse, lanes); });
  }
}

template <class T>
DF_KERNEL void softmax_forward_rows(T* x, float scale, float* e, int64_t rows, int64_t S) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) softmax_forward_few<4>(x + t * S, scale, e, S);
  for (; t < rows; ++t) softmax_forward_few<1>(x + t * S, scale, e, S);
}

template <int R, class G, class T>
DF_INLINE void softmax_backward_few(G* dp, const T* p, float scale, int64_t S) {
  vf dot[R];
  for (int r = 0; r < R; ++r) dot[r] = vf{};
  each(S, [&](int64_t i, auto lanes) DF_LAMBDA {
    for (int r = 0; r < R; ++r) dot[r] += load(dp + r * S + i, lanes) * load(p + r * S + i, lanes);
  });
  for (int r = 0; r < R; ++r) dot[r] = splat(fold_sum(dot[r]));
  each(S, [&](int64_t i, auto lanes) DF_LAMBDA {
    for (int r = 0; r < R; ++r) {
      G* d = dp + r * S + i;
      store(d, load(p + r * S + i, lanes) * scale * (load(d, lanes) - dot[r]), lanes);
    }
  });
}

template <class G, class T>
DF_KERNEL void softmax_backward_rows(G* dp, const T* p, float scale, int64_t rows, int64_t S) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) softmax_backward_few<4>(dp + t * S, p + t * S, scale, S);
  for (; t < rows; ++t) softmax_backward_few<1>(dp + t * S, p + t * S, scale, S);
}

}  // namespace difffit::DF_ISA
