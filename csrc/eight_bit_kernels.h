// Chunks of eight_bit.cpp; included once for each instruction set.

namespace difffit::DF_ISA {

typedef int8_t vb __attribute__((vector_size(DF_LANES)));

constexpr float kTop = 127.0f;
constexpr float kLeast = 1e-30f;      // a row whose largest value is less is all zeros
constexpr float kMagic = 12582912.0f;  // 1.5·2^23: a sum with it is rounded to an integer, ties to even

// The lanes whose number differs in the bit H.
template <int H>
DF_INLINE vf across(vf v) {
#if defined(__clang__)
  float lanes[W], other[W];
  store(lanes, v, Full{});
  for (int i = 0; i < W; ++i) other[i] = lanes[i ^ H];
  return load(other, Full{});
#else
  vi from;
  for (int i = 0; i < W; ++i) from[i] = i ^ H;
  return __builtin_shuffle(v, from);
#endif
}

// a + b and a - b of the lanes that differ in the bit H.
template <int H>
DF_INLINE vf within(vf v) {
  vf sign;
  for (int i = 0; i < W; ++i) sign[i] = i & H ? -1.0f : 1.0f;
  return v * sign + across<H>(v);
}

// Multiplies each `block` channels by a Hadamard matrix, without its factor. `row` has room up to whole vectors.
DF_INLINE void rotate(float* row, int64_t block, int64_t K) {
  for (int64_t i = 0; i < K; i += W) {
    vf v = load(row + i, Full{});
    if (block > 1) v = within<1>(v);
    if (block > 2) v = within<2>(v);
    if constexpr (W > 4) {
      if (block > 4) v = within<4>(v);
    }
    if constexpr (W > 8) {
      if (block > 8) v = within<8>(v);
    }
    store(row + i, v, Full{});
  }
  for (int64_t half = W; half < block; half *= 2) {  // whole vectors: W and the block are powers of two
    for (int64_t i = 0; i < K; i += 2 * half) {
      for (int64_t j = i; j < i + half; j += W) {
        const vf a = load(row + j, Full{}), b = load(row + j + half, Full{});
        store(row + j, a + b, Full{});
        store(row + j + half, a - b, Full{});
      }
    }
  }
}

DF_INLINE void store_bytes(int8_t* p, vi v, Full) {
  const vb bytes = __builtin_convertvector(v, vb);
  std::memcpy(p, &bytes, sizeof bytes);
}

DF_INLINE void store_bytes(int8_t* p, vi v, Part k) {
  for (int64_t i = 0; i < k.n; ++i) p[i] = static_cast<int8_t>(v[i]);
}

// scale = max |x| / 127, q = x / scale to the nearest; the scale is NaN where a value is not finite.
template <class T>
DF_KERNEL void quantize_chunk(const T* x, int64_t block, float* row, int8_t* q, float* scale, int64_t rows, int64_t K) {
  const float root = block == 64 ? 0.125f : block == 16 ? 0.25f : block == 4 ? 0.5f : 1.0f;
  for (int64_t m = 0; m < rows; ++m, x += K, q += K) {
    vf bad = {};
    each(K, [&](int64_t k, auto lanes) DF_LAMBDA {
      const vf v = load(x + k, lanes);
      bad += v * 0.0f;
      store(row + k, v, Full{});  // zeros behind the end
    });
    if (block > 1) rotate(row, block, K);
    vf most = {};
    for (int64_t k = 0; k < K; k += W) {
      const vf v = load(row + k, Full{}) * root;
      bad += v * 0.0f;  // the rotation of large values may overflow
      most = max_or(max_or(v, -v), most);
    }
    const float nothing = fold_sum(bad);
    const bool finite = nothing == 0.0f;
    float largest = finite ? fold_max(most) : 1.0f;
    largest = largest < kLeast ? kLeast : largest;
    const float factor = kTop / largest;
    each(K, [&](int64_t k, auto lanes) DF_LAMBDA {
      const vf v = finite ? load(row + k, Full{}) * root * factor : vf{};
      store_bytes(q + k, (vi)(v + kMagic) - 0x4b400000, lanes);
    });
    scale[m] = finite ? largest / kTop : nothing;
  }
}

DF_INLINE vf load(const int32_t* p, Full) {
  vi v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vf);
}

// `bias` may be null.
template <class P, class B, class Y>
DF_KERNEL void rescale_chunk(const P* product, const float* row, const float* column, const B* bias, Y* y, int64_t rows,
                             int64_t N) {
  for (int64_t m = 0; m < rows; ++m) {
    each(N, [&](int64_t n, auto lanes) DF_LAMBDA {
      vf v = load(product + m * N + n, lanes) * load(column + n, lanes) * row[m];
      if (bias) v += load(bias + n, lanes);
      store(y + m * N + n, v, lanes);
    });
  }
}

}  // namespace difffit::DF_ISA
