// Products of matrices that lie in a core's cache: C(m×n) (+)= A(m×k)·B(k×n), C in float32; included once for each
// instruction set. The elements of A and B are floats or, where the processor multiplies them in one instruction
// (DF_DOTS), pairs of bfloat16, consecutive in k: then k counts pairs, and a step is twice the work.
//
// C is made tile by tile in registers, kTileRows × kTileVectors vectors: 6×16 floats with AVX2. A step in k loads 16
// floats of B and 6 of A, each spread over a vector, for 12 fused multiply-adds. Zen and Intel cores start two of these
// and two loads a cycle, so 8 loads hide behind 6 cycles of arithmetic, and 12 independent sums behind its latency.
// With k = 64 a tile takes 384 cycles, and about 30 more to begin and to be stored.
//
//   - A may lie in memory any way: it is read one element at a time. It needs no packing, not even to be transposed.
//   - B is read by whole vectors along n, so its rows must be contiguous over a panel of kPanel columns. The tiles of
//     one column of C read the same panel of B, which stays in the first-level cache: kDepth·kPanel·4 bytes, 16 KB with
//     AVX2. Of A they read 4 bytes for 2·kPanel operations, from the second level. Where all of B is that small, the
//     tiles of one row of C come after one another and A's rows are what stays.
//
// Every element of C is a sum over k in its order, cut at multiples of kDepth, wherever its tile lies: the same bits
// however the rows of C are shared out.

namespace difffit::DF_ISA {

constexpr int kTileRows = 6;
constexpr int kTileVectors = DF_LANES == 16 ? 4 : 2;  // AVX-512 has 32 registers: 24 sums
constexpr int64_t kPanel = kTileVectors * W;
constexpr int64_t kDepth = 256;

// What one step in k multiplies, spread over a vector or loaded as one, and how it is added to a sum.
DF_INLINE vf spread(float x) { return splat(x); }
DF_INLINE vf multiply_add(vf sum, vf a, vf b) { return sum + a * b; }

#ifdef DF_DOTS
struct Pair {
  uint32_t bits;  // two bfloat16, the lower half for the smaller k
};

DF_INLINE vu spread(Pair x) { return vu{} + x.bits; }
DF_INLINE vf multiply_add(vf sum, vu a, vu b) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

DF_INLINE vu load(const Pair* p, Full) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

DF_INLINE void store(Pair* p, vu v) { std::memcpy(p, &v, sizeof v); }

// Pairs of two vectors, each rounded to the nearest bfloat16, ties to even.
DF_INLINE vu round_pairs(vf low, vf high) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (vu)_mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
}
#endif

// Element (i, k) is at data[i*row + k*step].
template <class E>
struct Left {
  const E* data;
  int64_t row, step;
};

// Row k of columns j*kPanel, ..., j*kPanel + kPanel - 1 begins at data[j*panel + k*step]. The last panel is read up to
// the end of a vector; there must be numbers, which do no harm.
template <class E>
struct Right {
  const E* data;
  int64_t step, panel;
};

template <int R, int C, class E>
DF_INLINE void multiply_tile(const E* a, int64_t a_row, int64_t a_step, const E* b, int64_t b_step, float* c,
                             int64_t c_row, int64_t k, bool add) {
  vf sum[R][C];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < C; ++v) sum[r][v] = vf{};
  }
  for (; k > 0; --k) {
    decltype(spread(*a)) right[C];
    for (int v = 0; v < C; ++v) right[v] = load(b + v * W, Full{});
    for (int r = 0; r < R; ++r) {
      const auto left = spread(a[r * a_row]);
      for (int v = 0; v < C; ++v) sum[r][v] = multiply_add(sum[r][v], left, right[v]);
    }
    a += a_step;
    b += b_step;
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < C; ++v) {
      float* p = c + r * c_row + v * W;
      store(p, add ? load(p, Full{}) + sum[r][v] : sum[r][v], Full{});
    }
  }
}

template <int C, class E>
DF_KERNEL void multiply_tiles(const E* a, int64_t a_row, int64_t a_step, const E* b, int64_t b_step, float* c,
                              int64_t c_row, int64_t m, int64_t k, bool add) {
  for (; m >= kTileRows; m -= kTileRows) {
    multiply_tile<kTileRows, C>(a, a_row, a_step, b, b_step, c, c_row, k, add);
    a += kTileRows * a_row;
    c += kTileRows * c_row;
  }
  switch (m) {
    case 5: return multiply_tile<5, C>(a, a_row, a_step, b, b_step, c, c_row, k, add);
    case 4: return multiply_tile<4, C>(a, a_row, a_step, b, b_step, c, c_row, k, add);
    case 3: return multiply_tile<3, C>(a, a_row, a_step, b, b_step, c, c_row, k, add);
    case 2: return multiply_tile<2, C>(a, a_row, a_step, b, b_step, c, c_row, k, add);
    case 1: return multiply_tile<1, C>(a, a_row, a_step, b, b_step, c, c_row, k, add);
  }
}

// C = A·B, or C += A·B. C is written up to the end of a vector, so its rows need room for that.
template <class E>
DF_KERNEL void multiply(Left<E> a, Right<E> b, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k, bool add) {
  for (int64_t first = 0; first < k; first += kDepth) {
    const int64_t depth = k - first < kDepth ? k - first : kDepth;
    const int64_t rows = depth * n <= kDepth * kPanel ? kTileRows : m;  // A's tile stays in the cache, or B's panel
    for (int64_t i = 0; i < m; i += rows) {
      const E* left = a.data + i * a.row + first * a.step;
      const int64_t height = m - i < rows ? m - i : rows;
      for (int64_t j = 0; j < n; j += kPanel) {
        const E* right = b.data + j / kPanel * b.panel + first * b.step;
        float* to = c + i * c_row + j;
        const int64_t vectors = (n - j + W - 1) / W;
        if (vectors >= kTileVectors) {
          multiply_tiles<kTileVectors>(left, a.row, a.step, right, b.step, to, c_row, height, depth, add || first);
        } else if (vectors == 1) {
          multiply_tiles<1>(left, a.row, a.step, right, b.step, to, c_row, height, depth, add || first);
        } else if (vectors == 2) {
          multiply_tiles<2>(left, a.row, a.step, right, b.step, to, c_row, height, depth, add || first);
        } else {
          multiply_tiles<3>(left, a.row, a.step, right, b.step, to, c_row, height, depth, add || first);
        }
      }
    }
  }
}

// -- packing ---------------------------------------------------------------------------------------------------------
inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }
inline int64_t panels_size(int64_t n, int64_t k) { return panels(n) * kPanel * k; }

// Columns of x (k, n), n a multiple of W, as panels (Right{to, kPanel, kPanel·k}): panels first, ..., last - 1.
DF_KERNEL void pack_columns(const float* x, float* to, int64_t k, int64_t n, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; ++p) {
    float* panel = to + p * kPanel * k;
    const int64_t width = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
    for (int64_t i = 0; i < k; ++i) {
      const float* row = x + i * n + p * kPanel;
      for (int64_t j = 0; j < width; j += W) store(panel + i * kPanel + j, load(row + j, Full{}), Full{});
      for (int64_t j = width; j < kPanel; j += W) store(panel + i * kPanel + j, vf{}, Full{});
    }
  }
}

// The transpose of x (rows, d) as panels (Right{panels, kPanel, kPanel·d}), its row c times factor_c; zero behind
// the last row of x.
DF_KERNEL void pack_transposed(const float* x, int64_t ld, const float* factor, float* panels, int64_t rows,
                               int64_t d) {
  for (int64_t first = 0; first < rows; first += kPanel, panels += kPanel * d) {
    const int64_t n = rows - first < kPanel ? rows - first : kPanel;
    for (int64_t c = 0; c < d; ++c) {
      const float* column = x + first * ld + c;
      const float f = factor ? factor[c] : 1.0f;
      for (int64_t j = 0; j < n; ++j) panels[c * kPanel + j] = column[j * ld] * f;
      for (int64_t j = n; j < kPanel; ++j) panels[c * kPanel + j] = 0.0f;
    }
  }
}

// The same of the transpose of x (n, k): panels first, ..., last - 1.
DF_KERNEL void pack_rows(const float* x, float* to, int64_t k, int64_t n, int64_t first, int64_t last) {
  const int64_t begin = first * kPanel, end = last * kPanel < n ? last * kPanel : n;
  pack_transposed(x + begin * k, k, nullptr, to + begin * k, end - begin, k);
}

}  // namespace difffit::DF_ISA
