// Vectors of W floats, loaded from and stored to float32 or bfloat16. Included by foreach_isa.h, once for each
// instruction set; written with the vector extension of GCC and Clang, so the same text serves x86 and ARM.
//
// Loops go through `each`, which hands the body full vectors and then, once, what is left of a row: Part lanes load as
// zeros and are not stored. Sums keep one accumulator a lane and are folded in a fixed order: same input, same bits.

namespace difffit::DF_ISA {

constexpr int W = DF_LANES;
typedef float vf __attribute__((vector_size(DF_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(DF_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(DF_LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(DF_LANES * 2)));

// Where GCC needs help to find the one instruction. widen, narrow: 16 bits to the low half of 32-bit lanes and back.
// max_or, min_or: a where it is greater (less), b otherwise, so b too where one of them is NaN.
// (The unmasked AVX-512 intrinsics leave something undefined in GCC 12, which it then warns of.)
#if DF_LANES == 16
DF_INLINE vu widen(vh v) { return (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v); }
DF_INLINE vh narrow(vu v) { return (vh)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v); }
DF_INLINE vf max_or(vf a, vf b) { return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
DF_INLINE vf min_or(vf a, vf b) { return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#elif DF_LANES == 8
DF_INLINE vu widen(vh v) { return (vu)_mm256_cvtepu16_epi32((__m128i)v); }
DF_INLINE vh narrow(vu v) {
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
DF_INLINE vf max_or(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
DF_INLINE vf min_or(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
DF_INLINE vu widen(vh v) { return __builtin_convertvector(v, vu); }
DF_INLINE vh narrow(vu v) { return __builtin_convertvector(v, vh); }
DF_INLINE vf max_or(vf a, vf b) { return a > b ? a : b; }
DF_INLINE vf min_or(vf a, vf b) { return a < b ? a : b; }
#endif

struct Full {};
struct Part {
  int64_t n;
};

DF_INLINE vf splat(float value) { return value - vf{}; }  // x - 0 is x: a broadcast alone, unlike 0 + x

DF_INLINE vf load(const float* p, Full) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

DF_INLINE vf load(const bf16* p, Full) {
  vh half;
  std::memcpy(&half, p, sizeof half);
  return (vf)(widen(half) << 16);
}

template <class T>
DF_INLINE vf load(const T* p, Part k) {
  T lanes[W] = {};
  for (int64_t i = 0; i < k.n; ++i) lanes[i] = p[i];
  return load(lanes, Full{});
}

// store returns the value as stored: rounded, for bfloat16 (to nearest, ties to even; NaN stays NaN; the one instruction
// that does it makes denormal numbers zero).
DF_INLINE vf store(float* p, vf v, Full) {
  std::memcpy(p, &v, sizeof v);
  return v;
}

#ifdef DF_DOTS
DF_INLINE vf store(bf16* p, vf v, Full) {
  const vh half = (vh)_mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof half);
  return (vf)(widen(half) << 16);
}
#else
DF_INLINE vf store(bf16* p, vf v, Full) {
  vu bits = (vu)v;
  bits += 0x7fffu + ((bits >> 16) & 1u);
  bits = v == v ? bits : vu{} + 0x7fc00000u;
  bits >>= 16;
  const vh half = narrow(bits);
  std::memcpy(p, &half, sizeof half);
  return (vf)(bits << 16);
}
#endif

template <class T>
DF_INLINE vf store(T* p, vf v, Part k) {
  T lanes[W];
  const vf stored = store(lanes, v, Full{});
  for (int64_t i = 0; i < k.n; ++i) p[i] = lanes[i];
  return stored;
}

// Sets the lanes behind the end of the row to zero.
DF_INLINE vf keep(vf v, Full) { return v; }
DF_INLINE vf keep(vf v, Part k) {
  float lanes[W];
  store(lanes, v, Full{});
  for (int64_t i = k.n; i < W; ++i) lanes[i] = 0.0f;
  return load(lanes, Full{});
}

DF_INLINE float fold_sum(vf v) {
  float lanes[W];
  store(lanes, v, Full{});
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

DF_INLINE float fold_max(vf v) {
  float lanes[W];
  store(lanes, v, Full{});
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  }
  return lanes[0];
}

template <class F>
DF_INLINE void each(int64_t n, F body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, Full{});
  if (i < n) body(i, Part{n - i});
}

// out[i] = sum of partial[k*stride + i] over k = 0, 1, ... in this order.
DF_KERNEL void sum_partials(const float* partial, int64_t count, int64_t stride, float* out, int64_t n) {
  each(n, [&](int64_t i, auto lanes) DF_LAMBDA {
    vf sum = {};
    for (int64_t k = 0; k < count; ++k) sum += load(partial + k * stride + i, lanes);
    store(out + i, sum, lanes);
  });
}

}  // namespace difffit::DF_ISA
