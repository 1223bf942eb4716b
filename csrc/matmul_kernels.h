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

#ifdef DF_DOTS
// The same for pairs of bfloat16. Where k runs along the rows of a matrix, two neighbours are a pair as they lie. Where it
// runs down the columns, two rows are folded into one.
inline int64_t pairs(int64_t n) { return (n + 1) / 2; }

// Rows 2j and 2j + 1 of x, bfloat16, as row j of pairs, up to the end of a vector; zero behind the last row. ld: pairs.
DF_KERNEL void fold_rows(const Pair* x, int64_t ld, Pair* to, int64_t to_ld, int64_t rows, int64_t d) {
  for (int64_t t = 0; t < rows; t += 2) {
    const bf16 *low = reinterpret_cast<const bf16*>(x + t * ld), *high = reinterpret_cast<const bf16*>(x + (t + 1) * ld);
    Pair* row = to + t / 2 * to_ld;
    for (int64_t c = 0; c < d; c += W) {
      const vu first = (vu)load(low + c, Full{}) >> 16;
      store(row + c, t + 1 < rows ? first | (vu)load(high + c, Full{}) : first);
    }
  }
}

// Sixteen rows of sixteen, transposed: in four steps, in which halves, quarters, ... of two rows change places.
template <int S>
DF_INLINE void exchange(vu* row) {
  alignas(64) uint32_t low[16], high[16];
  for (uint32_t j = 0; j < 16; ++j) {
    low[j] = j & S ? 16 + j - S : j;
    high[j] = j & S ? 16 + j : j + S;
  }
  const __m512i first = _mm512_load_si512(low), second = _mm512_load_si512(high);
  for (int i = 0; i < 16; ++i) {
    if (i & S) continue;
    const __m512i a = (__m512i)row[i], b = (__m512i)row[i + S];
    row[i] = (vu)_mm512_permutex2var_epi32(a, first, b);
    row[i + S] = (vu)_mm512_permutex2var_epi32(a, second, b);
  }
}

// The transpose of the pairs of `rows` rows, as panels (Right{panels, kPanel, kPanel·d2}); zero behind the last row.
DF_KERNEL void transpose_pairs(const Pair* x, int64_t ld, Pair* panels, int64_t rows, int64_t d2) {
  for (int64_t first = 0; first < rows; first += kPanel, panels += kPanel * d2) {
    const int64_t n = rows - first < kPanel ? rows - first : kPanel;
    for (int64_t c = 0; c < d2; c += W) {
      const int64_t width = d2 - c < W ? d2 - c : W;
      for (int64_t j = 0; j < kPanel; j += W) {
        const Pair* from = x + (first + j) * ld + c;
        Pair* to = panels + c * kPanel + j;
        if (width == W && j + W <= n) {
          vu row[W];
          for (int i = 0; i < W; ++i) row[i] = load(from + i * ld, Full{});
          exchange<1>(row), exchange<2>(row), exchange<4>(row), exchange<8>(row);
          for (int i = 0; i < W; ++i) store(to + i * kPanel, row[i]);
        } else {
          for (int64_t k = 0; k < width; ++k) {
            for (int64_t i = 0; i < W; ++i) to[k * kPanel + i] = j + i < n ? from[i * ld + k] : Pair{0};
          }
        }
      }
    }
  }
}

// As pack_columns and pack_rows above, k even.
DF_KERNEL void pack_columns(const bf16* x, float* to, int64_t k, int64_t n, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; ++p) {
    Pair* panel = reinterpret_cast<Pair*>(to) + p * kPanel * (k / 2);
    const int64_t width = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
    for (int64_t i = 0; i < k; i += 2, panel += kPanel) {
      const bf16 *low = x + i * n + p * kPanel, *high = low + n;
      for (int64_t j = 0; j < width; j += W) store(panel + j, (vu)load(low + j, Full{}) >> 16 | (vu)load(high + j, Full{}));
      for (int64_t j = width; j < kPanel; j += W) store(panel + j, vu{});
    }
  }
}

DF_KERNEL void pack_rows(const bf16* x, float* to, int64_t k, int64_t n, int64_t first, int64_t last) {
  const int64_t begin = first * kPanel, end = last * kPanel < n ? last * kPanel : n;
  transpose_pairs(reinterpret_cast<const Pair*>(x) + begin * (k / 2), k / 2,
                  reinterpret_cast<Pair*>(to) + begin * (k / 2), end - begin, k / 2);
}
#endif

// -- with packed weights ---------------------------------------------------------------------------------------------
// The element that a product of E takes: a float, or a pair of bfloat16.
template <class E>
struct Step {
  using type = E;
  static constexpr int64_t kNumbers = 1;
};

#ifdef DF_DOTS
template <>
struct Step<bf16> {
  using type = Pair;
  static constexpr int64_t kNumbers = 2;
};
#endif

// C (m, n) (+)= A (m, k)·B, where A's rows are `ld` numbers apart and B is some steps of panels that are `depth` numbers
// deep, by pack_rows or pack_columns.
template <class E>
DF_INLINE void multiply_packed(const E* a, int64_t ld, const float* panels, int64_t depth, float* c, int64_t c_row,
                               int64_t m, int64_t n, int64_t k, bool add) {
  using S = typename Step<E>::type;
  constexpr int64_t numbers = Step<E>::kNumbers;
  multiply<S>({reinterpret_cast<const S*>(a), ld / numbers, 1},
              {reinterpret_cast<const S*>(panels), kPanel, kPanel * (depth / numbers)}, c, c_row, m, n, k / numbers, add);
}

// Where such panels begin at column n (a multiple of kPanel) or at step k.
template <class E>
inline const float* panels_from(const float* panels, int64_t depth, int64_t n, int64_t k) {
  return panels + (n * depth + k * kPanel) / Step<E>::kNumbers;
}

// Where a product puts its result that is to be `to`: there if it is float32, else into `memory`, from where round_result
// brings it there.
inline float* result_of(float* to, float*) { return to; }
inline void round_result(const float*, float*, int64_t) {}
#ifdef DF_DOTS
inline float* result_of(bf16*, float* memory) { return memory; }
DF_KERNEL void round_result(const float* x, bf16* to, int64_t n) {
  for (int64_t i = 0; i < n; i += W) store(to + i, load(x + i, Full{}), Full{});
}
#endif

}  // namespace difffit::DF_ISA
