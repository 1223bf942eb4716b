// Chunks of frozen_mlp.cpp; included once for each instruction set.
//
// With z = sqrt(2/pi)·(u + 0.044715·u³), (1 + tanh z)/2 is the logistic function of 2z: one exp and one division.
// Beyond |u| = 9.5 its value and its complement are below 1e-33; u is held there, so nothing overflows.
#include "elementary.h"
#include "matmul_kernels.h"

namespace difffit::DF_ISA {

constexpr float kGeluBound = 9.5f;
constexpr float kScale = 1.5957691216f;  // 2·sqrt(2/pi)
constexpr float kCubic = 0.044715f;

DF_INLINE vf gelu(vf u) {
  const vf x = max_or(splat(-kGeluBound), u);
  const vf b = min_or(splat(kGeluBound), x);
  const vf e = exp_bounded(b * (b * b * (-kScale * kCubic) - kScale));
  return x / (e + 1.0f);
}

template <class T>
DF_KERNEL void gelu_forward_chunk(const T* u, T* g, int64_t n) {
  each(n, [&](int64_t i, auto lanes) DF_LAMBDA { store(g + i, gelu(load(u + i, lanes)), lanes); });
}

// Rows of one sample, whose bias is added here.
template <class T>
DF_KERNEL void gelu_bias_forward_chunk(const T* u, const float* bias, T* g, int64_t rows, int64_t N) {
  for (int64_t m = 0; m < rows; ++m) {
    each(N, [&](int64_t n, auto lanes) DF_LAMBDA {
      store(g + m * N + n, gelu(load(u + m * N + n, lanes) + load(bias + n, lanes)), lanes);
    });
  }
}

// gelu'(u) = p + u·p·(1 - p)·2z', p the logistic function of 2z.
DF_INLINE vf gelu_slope(vf u) {
  const vf b = min_or(splat(kGeluBound), max_or(splat(-kGeluBound), u));
  const vf square = b * b;
  const vf e = exp_bounded(b * (square * (-kScale * kCubic) - kScale));
  const vf p = 1.0f / (e + 1.0f);
  const vf slope = b * (square * (3.0f * kScale * kCubic) + kScale);
  return p + p * (p * e) * slope;
}

// `bias` is read where it is not in u already: where kBias is set.
template <int R, bool kBias, class T>
DF_INLINE void gelu_backward_rows(const T* dg, const T* u, const float* bias, T* du, float* db, int64_t N) {
  each(N, [&](int64_t n, auto lanes) DF_LAMBDA {
    vf sum = load(db + n, lanes);
    for (int r = 0; r < R; ++r) {
      vf v = load(u + r * N + n, lanes);
      if constexpr (kBias) v += load(bias + n, lanes);
      const vf d = load(dg + r * N + n, lanes) * gelu_slope(v);
      store(du + r * N + n, d, lanes);
      sum += d;
    }
    store(db + n, sum, lanes);
  });
}

template <bool kBias, class T>
DF_KERNEL void gelu_backward_chunk(const T* dg, const T* u, const float* bias, T* du, float* db, int64_t rows,
                                   int64_t N) {
  std::memset(db, 0, N * sizeof(float));
  int64_t m = 0;
  for (; m + 2 <= rows; m += 2) gelu_backward_rows<2, kBias>(dg + m * N, u + m * N, bias, du + m * N, db, N);
  for (; m < rows; ++m) gelu_backward_rows<1, kBias>(dg + m * N, u + m * N, bias, du + m * N, db, N);
}

// -- both products and what is between them -------------------------------------------------------------------------------
// A unit is some rows, a piece kDepth of the F hidden channels. Of a piece the first product makes the rows' values, GELU
// or its slope meets them in the second-level cache, and the second product adds what they give to the rows' result.

constexpr int64_t kHidden = kDepth + 16;  // the distance of rows of a piece: an odd number of cache lines

inline int64_t mlp_room(int64_t rows) { return rows * kHidden; }

// u = h·w1ᵀ + b1 and branch = gelu(u)·w2ᵀ of `rows` rows; p1, p2: pack_rows of w1 (F, D) and w2 (D, F). room: rows·kHidden.
// kBare: b1 is that of the rows' sample, and what is stored as u is h·w1ᵀ without it.
template <bool kBare>
DF_KERNEL void mlp_forward_rows(const float* h, const float* p1, const float* b1, const float* p2, float* u,
                                float* branch, float* room, int64_t rows, int64_t D, int64_t F) {
  for (int64_t f = 0; f < F; f += kDepth) {
    const int64_t width = F - f < kDepth ? F - f : kDepth;
    multiply<float>({h, D, 1}, {p1 + f * D, kPanel, kPanel * D}, room, kHidden, rows, width, D, false);
    for (int64_t m = 0; m < rows; ++m) {
      float *to = u + m * F + f, *g = room + m * kHidden;
      for (int64_t i = 0; i < width; i += W) {
        const vf v = load(g + i, Full{}), b = load(b1 + f + i, Full{});
        if constexpr (kBare) {
          store(g + i, gelu(store(to + i, v, Full{}) + b), Full{});
        } else {
          store(g + i, gelu(store(to + i, v + b, Full{})), Full{});
        }
      }
    }
    multiply<float>({room, kHidden, 1}, {p2 + f * kPanel, kPanel, kPanel * F}, branch, D, rows, D, width, f > 0);
  }
}

// R rows of du = dg·gelu'(u), in place, added to db; of dg·gelu'(u + bias) where kBare is set.
template <int R, bool kBare>
DF_INLINE void mlp_slopes(float* dg, const float* u, const float* bias, int64_t F, float* db, int64_t width) {
  for (int64_t i = 0; i < width; i += W) {
    vf sum = load(db + i, Full{});
    for (int r = 0; r < R; ++r) {
      float* p = dg + r * kHidden + i;
      vf v = load(u + r * F + i, Full{});
      if constexpr (kBare) v += load(bias + i, Full{});
      sum += store(p, load(p, Full{}) * gelu_slope(v), Full{});
    }
    store(db + i, sum, Full{});
  }
}

// du = (dbranch·w2)·gelu'(u), dh = du·w1 of `rows` rows, and db, the sums of du over every kChunkRows of them, (.., F).
// p1, p2: pack_columns of w1 and w2; dh: null where nobody asks for it. room: rows·kHidden. kBare: u is without `bias`, that
// of the rows' sample.
template <bool kBare>
DF_KERNEL void mlp_backward_rows(const float* dbranch, const float* p1, const float* p2, const float* u,
                                 const float* bias, float* dh, float* db, float* room, int64_t rows, int64_t D,
                                 int64_t F) {
  for (int64_t f = 0; f < F; f += kDepth) {
    const int64_t width = F - f < kDepth ? F - f : kDepth;
    multiply<float>({dbranch, D, 1}, {p2 + f * D, kPanel, kPanel * D}, room, kHidden, rows, width, D, false);
    for (int64_t first = 0; first < rows; first += kChunkRows) {
      float* sums = db + first / kChunkRows * F + f;
      const float* mine = kBare ? bias + f : nullptr;
      std::memset(sums, 0, width * sizeof(float));
      const int64_t end = rows < first + kChunkRows ? rows : first + kChunkRows;
      int64_t m = first;
      for (; m + 2 <= end; m += 2) mlp_slopes<2, kBare>(room + m * kHidden, u + m * F + f, mine, F, sums, width);
      for (; m < end; ++m) mlp_slopes<1, kBare>(room + m * kHidden, u + m * F + f, mine, F, sums, width);
    }
    if (dh) multiply<float>({room, kHidden, 1}, {p1 + f * kPanel, kPanel, kPanel * F}, dh, D, rows, D, width, f > 0);
  }
}

}  // namespace difffit::DF_ISA
