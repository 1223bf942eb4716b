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

// gelu'(u) = p + u·p·(1 - p)·2z', p the logistic function of 2z.
DF_INLINE vf gelu_slope(vf u) {
  const vf b = min_or(splat(kGeluBound), max_or(splat(-kGeluBound), u));
  const vf square = b * b;
  const vf e = exp_bounded(b * (square * (-kScale * kCubic) - kScale));
  const vf p = 1.0f / (e + 1.0f);
  const vf slope = b * (square * (3.0f * kScale * kCubic) + kScale);
  return p + p * (p * e) * slope;
}

template <int R, class T>
DF_INLINE void gelu_backward_rows(const T* dg, const T* u, T* du, float* db, int64_t N) {
  each(N, [&](int64_t n, auto lanes) DF_LAMBDA {
    vf sum = load(db + n, lanes);
    for (int r = 0; r < R; ++r) {
      const vf d = load(dg + r * N + n, lanes) * gelu_slope(load(u + r * N + n, lanes));
      store(du + r * N + n, d, lanes);
      sum += d;
    }
    store(db + n, sum, lanes);
  });
}

template <class T>
DF_KERNEL void gelu_backward_chunk(const T* dg, const T* u, T* du, float* db, int64_t rows, int64_t N) {
  std::memset(db, 0, N * sizeof(float));
  int64_t m = 0;
  for (; m + 2 <= rows; m += 2) gelu_backward_rows<2>(dg + m * N, u + m * N, du + m * N, db, N);
  for (; m < rows; ++m) gelu_backward_rows<1>(dg + m * N, u + m * N, du + m * N, db, N);
}

// -- both products and what is between them -------------------------------------------------------------------------------
// A unit is some rows, a piece kDepth of the F hidden channels. Of a piece the first product makes the rows' values, GELU
// or its slope meets them in the second-level cache, and the second product adds what they give to the rows' result.

constexpr int64_t kHidden = kDepth + 16;  // the distance of rows of a piece: an odd number of cache lines

inline int64_t mlp_room(int64_t rows) { return rows * kHidden; }

// u = h·w1ᵀ + b1 and branch = gelu(u)·w2ᵀ of `rows` rows; p1, p2: pack_rows of w1 (F, D) and w2 (D, F). room: rows·kHidden.
DF_KERNEL void mlp_forward_rows(const float* h, const float* p1, const float* b1, const float* p2, float* u,
                                float* branch, float* room, int64_t rows, int64_t D, int64_t F) {
  for (int64_t f = 0; f < F; f += kDepth) {
    const int64_t width = F - f < kDepth ? F - f : kDepth;
    multiply({h, D, 1}, {p1 + f * D, kPanel, kPanel * D}, room, kHidden, rows, width, D, false);
    for (int64_t m = 0; m < rows; ++m) {
      float *to = u + m * F + f, *g = room + m * kHidden;
      for (int64_t i = 0; i < width; i += W) {
        store(g + i, gelu(store(to + i, load(g + i, Full{}) + load(b1 + f + i, Full{}), Full{})), Full{});
      }
    }
    multiply({room, kHidden, 1}, {p2 + f * kPanel, kPanel, kPanel * F}, branch, D, rows, D, width, f > 0);
  }
}

// R rows of du = dg·gelu'(u), in place, added to db.
template <int R>
DF_INLINE void mlp_slopes(float* dg, const float* u, int64_t F, float* db, int64_t width) {
  for (int64_t i = 0; i < width; i += W) {
    vf sum = load(db + i, Full{});
    for (int r = 0; r < R; ++r) {
      float* p = dg + r * kHidden + i;
      sum += store(p, load(p, Full{}) * gelu_slope(load(u + r * F + i, Full{})), Full{});
    }
    store(db + i, sum, Full{});
  }
}

// du = (dbranch·w2)·gelu'(u), dh = du·w1 of `rows` rows, and db, the sums of du over every kChunkRows of them, (.., F).
// p1, p2: pack_columns of w1 and w2; dh: null where nobody asks for it. room: rows·kHidden.
DF_KERNEL void mlp_backward_rows(const float* dbranch, const float* p1, const float* p2, const float* u, float* dh,
                                 float* db, float* room, int64_t rows, int64_t D, int64_t F) {
  for (int64_t f = 0; f < F; f += kDepth) {
    const int64_t width = F - f < kDepth ? F - f : kDepth;
    multiply({dbranch, D, 1}, {p2 + f * D, kPanel, kPanel * D}, room, kHidden, rows, width, D, false);
    for (int64_t first = 0; first < rows; first += kChunkRows) {
      float* sums = db + first / kChunkRows * F + f;
      std::memset(sums, 0, width * sizeof(float));
      const int64_t end = rows < first + kChunkRows ? rows : first + kChunkRows;
      int64_t m = first;
      for (; m + 2 <= end; m += 2) mlp_slopes<2>(room + m * kHidden, u + m * F + f, F, sums, width);
      for (; m < end; ++m) mlp_slopes<1>(room + m * kHidden, u + m * F + f, F, sums, width);
    }
    if (dh) multiply({room, kHidden, 1}, {p1 + f * kPanel, kPanel, kPanel * F}, dh, D, rows, D, width, f > 0);
  }
}

}  // namespace difffit::DF_ISA
