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

// Float32 is read by the second product where it lies; bfloat16 is rounded beside it, and the result added up in float32.

constexpr int64_t kHidden = kDepth + 16;  // the distance of rows of a piece: an odd number of cache lines

// Of a unit: a piece as the first product gives it, and what the second takes.
template <class E>
struct Piece {
  float* made;
  E* taken;
  float* result;  // for bfloat16 alone
  static constexpr int64_t kRow = std::is_same_v<E, float> ? kHidden : kDepth + 32;  // of what is taken, in numbers

  Piece(float* memory, int64_t rows) : made(memory), taken(reinterpret_cast<E*>(memory)), result(nullptr) {
    if constexpr (!std::is_same_v<E, float>) {
      taken = reinterpret_cast<E*>(memory + rows * kHidden);
      result = memory + rows * (kHidden + kRow / 2);
    }
  }
};

// The floats of memory that a unit wants.
template <class E>
inline int64_t mlp_room(int64_t rows, int64_t D) {
  return rows * (kHidden + (std::is_same_v<E, float> ? 0 : Piece<E>::kRow / 2 + D));
}

// u = h·w1ᵀ + b1 and branch = gelu(u)·w2ᵀ of `rows` rows; p1, p2: pack_rows of w1 (F, D) and w2 (D, F). memory: mlp_room.
// kBare: b1 is that of the rows' sample, and what is stored as u is h·w1ᵀ without it.
template <class E, bool kBare>
DF_KERNEL void mlp_forward_rows(const E* h, const float* p1, const float* b1, const float* p2, E* u, E* branch,
                                float* memory, int64_t rows, int64_t D, int64_t F) {
  const Piece<E> piece(memory, rows);
  float* result = result_of(branch, piece.result);
  for (int64_t f = 0; f < F; f += kDepth) {
    const int64_t width = F - f < kDepth ? F - f : kDepth;
    multiply_packed(h, D, panels_from<E>(p1, D, f, 0), D, piece.made, kHidden, rows, width, D, false);
    for (int64_t m = 0; m < rows; ++m) {
      const float* made = piece.made + m * kHidden;
      E *to = u + m * F + f, *g = piece.taken + m * piece.kRow;
      for (int64_t i = 0; i < width; i += W) {
        const vf v = load(made + i, Full{}), b = load(b1 + f + i, Full{});
        if constexpr (kBare) {
          store(g + i, gelu(store(to + i, v, Full{}) + b), Full{});
        } else {
          store(g + i, gelu(store(to + i, v + b, Full{})), Full{});
        }
      }
    }
    multiply_packed(piece.taken, piece.kRow, panels_from<E>(p2, F, 0, f), F, result, D, rows, D, width, f > 0);
  }
  round_result(result, branch, rows * D);
}

// R rows of du = dg·gelu'(u), or dg·gelu'(u + bias) where kBare is set, added to db before they are rounded.
template <int R, bool kBare, class E>
DF_INLINE void mlp_slopes(const float* dg, const E* u, const float* bias, int64_t F, E* du, float* db, int64_t width) {
  for (int64_t i = 0; i < width; i += W) {
    vf sum = load(db + i, Full{});
    for (int r = 0; r < R; ++r) {
      vf v = load(u + r * F + i, Full{});
      if constexpr (kBare) v += load(bias + i, Full{});
      const vf d = load(dg + r * kHidden + i, Full{}) * gelu_slope(v);
      store(du + r * Piece<E>::kRow + i, d, Full{});
      sum += d;
    }
    store(db + i, sum, Full{});
  }
}

// du = (dbranch·w2)·gelu'(u), dh = du·w1 of `rows` rows, and db, the sums of du over every kChunkRows of them, (.., F).
// p1, p2: pack_columns of w1 and w2; dh: null where nobody asks for it. memory: mlp_room. kBare: u is without `bias`, that of
// the rows' sample.
template <class E, bool kBare>
DF_KERNEL void mlp_backward_rows(const E* dbranch, const float* p1, const float* p2, const E* u, const float* bias, E* dh,
                                 float* db, float* memory, int64_t rows, int64_t D, int64_t F) {
  const Piece<E> piece(memory, rows);
  float* result = result_of(dh, piece.result);
  for (int64_t f = 0; f < F; f += kDepth) {
    const int64_t width = F - f < kDepth ? F - f : kDepth;
    multiply_packed(dbranch, D, panels_from<E>(p2, D, f, 0), D, piece.made, kHidden, rows, width, D, false);
    for (int64_t first = 0; first < rows; first += kChunkRows) {
      float* sums = db + first / kChunkRows * F + f;
      const float* mine = kBare ? bias + f : nullptr;
      std::memset(sums, 0, width * sizeof(float));
      const int64_t end = rows < first + kChunkRows ? rows : first + kChunkRows;
      int64_t m = first;
      for (; m + 2 <= end; m += 2) {
        mlp_slopes<2, kBare>(piece.made + m * kHidden, u + m * F + f, mine, F, piece.taken + m * piece.kRow, sums, width);
      }
      for (; m < end; ++m) {
        mlp_slopes<1, kBare>(piece.made + m * kHidden, u + m * F + f, mine, F, piece.taken + m * piece.kRow, sums, width);
      }
    }
    if (dh) multiply_packed(piece.taken, piece.kRow, panels_from<E>(p1, F, 0, f), F, result, D, rows, D, width, f > 0);
  }
  if (dh) round_result(result, dh, rows * D);
}

}  // namespace difffit::DF_ISA
