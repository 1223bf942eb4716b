// Rows of attention.cpp; included once for each instruction set.
#include "elementary.h"
#include "matmul_kernels.h"

namespace difffit::DF_ISA {

// -- sizes and scratch memory ----------------------------------------------------------------------------------------
constexpr int64_t kQueryRows = 48;      // queries whose scores are made at a time: fewer, where kScores floats
constexpr int64_t kScores = 48 * 1024;  // do not hold theirs against all keys, forward
constexpr int64_t kQueries = 256;       // queries whose gradients of scores are kept, against kKeyRows keys, backward

// The distance of rows of n floats: a whole number of vectors, and an odd one of cache lines, so that the rows of a
// column do not push each other out of the first-level cache.
inline int64_t row_length(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

inline int64_t query_rows(int64_t tokens) {
  const int64_t fit = kScores / row_length(tokens) / kTileRows * kTileRows;
  return fit < kTileRows ? kTileRows : fit < kQueryRows ? fit : kQueryRows;
}

// Scratch memory, handed out in pieces that begin on a cache line if `base` does. Without memory it only counts.
struct Scratch {
  float* base;
  int64_t used = 0;
  float* take(int64_t n) {
    float* piece = base ? base + used : nullptr;
    used += (n + 15) / 16 * 16;
    return piece;
  }
};

// The vectors of a head as the kernels use them.
struct HeadVectors {
  float *bias, *factor, *query, *value;  // b, g, d^-1/2·g, gamma_v

  HeadVectors(Scratch& scratch, int64_t d)
      : bias(scratch.take(d)), factor(scratch.take(d)), query(scratch.take(d)), value(scratch.take(d)) {}

  template <class T>
  void fill(const Head<T>& h) {
    for (int64_t c = 0; c < h.d; ++c) {
      bias[c] = h.bias[c];
      factor[c] = h.factor ? h.factor[c] : 1.0f;
      query[c] = h.scale * factor[c];
      value[c] = h.value_factor ? h.value_factor[c] : 1.0f;
    }
  }
};

// The rows of z lie pages apart, where no hardware looks ahead: without this packing takes twice as long. Looking
// behind the last row does no harm.
constexpr int64_t kAhead = 8;

template <class T>
DF_INLINE void prefetch_row(const T* x, int64_t d) {
  for (int64_t c = 0; c < d; c += 64 / sizeof(T)) __builtin_prefetch(x + c);
}

// -- packing ---------------------------------------------------------------------------------------------------------
// to_t = f(x_t), zero from the end of a row to the end of its last vector.
template <class T, class F>
DF_INLINE void pack_rows(const T* x, int64_t stride, float* to, int64_t ld, int64_t rows, int64_t d, F f) {
  for (int64_t t = 0; t < rows; ++t) {
    prefetch_row(x + (t + kAhead) * stride, d);
    each(d, [&](int64_t c, auto lanes) DF_LAMBDA {
      store(to + t * ld + c, keep(f(load(x + t * stride + c, lanes), c, lanes), lanes), Full{});
    });
  }
}

template <class T>
DF_KERNEL void pack_plain(const T* x, int64_t stride, float* to, int64_t ld, int64_t rows, int64_t d) {
  pack_rows(x, stride, to, ld, rows, d, [](vf v, int64_t, auto) DF_LAMBDA { return v; });
}

template <class T>
DF_KERNEL void pack_queries(const T* x, int64_t stride, const float* bias, const float* factor, float* to, int64_t ld,
                            int64_t rows, int64_t d) {
  pack_rows(x, stride, to, ld, rows, d, [&](vf v, int64_t c, auto lanes) DF_LAMBDA {
    return (v + load(bias + c, lanes)) * load(factor + c, lanes);
  });
}

// -- forward ---------------------------------------------------------------------------------------------------------
// p <- exp(s - max) in every row of n, which may lie where s does; the inverse of the row's sum, before p is rounded, and the
// logarithm of the sum of exp(s). Behind the end of a row p is zero up to the end of a vector.
template <int R, class P>
DF_INLINE void exponentials_few(const float* s, int64_t ld, P* p, int64_t p_ld, float* inverse, float* lse, int64_t n) {
  vf top[R];
  for (int r = 0; r < R; ++r) top[r] = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    for (int r = 0; r < R; ++r) top[r] = max_or(load(s + r * ld + i, Full{}), top[r]);
  }
  for (int r = 0; r < R; ++r) {
    const float* row = s + r * ld;
    P* to = p + r * p_ld;
    float largest = fold_max(top[r]);
    for (int64_t j = i; j < n; ++j) largest = row[j] > largest ? row[j] : largest;
    vf sum = {};
    each(n, [&](int64_t j, auto lanes) DF_LAMBDA {
      const vf e = keep(exp_nonpositive(load(row + j, lanes) - largest), lanes);
      store(to + j, e, Full{});
      sum += e;
    });
    const float total = fold_sum(sum);
    inverse[r] = 1.0f / total;
    lse[r] = largest + __builtin_logf(total);
  }
}

template <class P>
DF_KERNEL void exponentials(const float* s, int64_t ld, P* p, int64_t p_ld, float* inverse, float* lse, int64_t rows,
                            int64_t n) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) exponentials_few<4>(s + t * ld, ld, p + t * p_ld, p_ld, inverse + t, lse + t, n);
  for (; t < rows; ++t) exponentials_few<1>(s + t * ld, ld, p + t * p_ld, p_ld, inverse + t, lse + t, n);
}

template <class T>
DF_KERNEL void scale_output(const float* sum, int64_t ld, const float* inverse, const float* factor, T* o,
                            int64_t stride, int64_t rows, int64_t d) {
  for (int64_t t = 0; t < rows; ++t) {
    prefetch_row(o + (t + kAhead) * stride, d);
    each(d, [&](int64_t c, auto lanes) DF_LAMBDA {
      store(o + t * stride + c, load(sum + t * ld + c, lanes) * inverse[t] * load(factor + c, lanes), lanes);
    });
  }
}

struct ForwardRoom {
  Scratch scratch;
  HeadVectors vectors;
  float *keys, *values, *queries, *scores, *sums, *inverse;

  ForwardRoom(float* base, int64_t tokens, int64_t d)
      : scratch{base},
        vectors(scratch, d),
        keys(scratch.take(panels_size(tokens, d))),
        values(scratch.take(tokens * row_length(d))),
        queries(scratch.take((query_rows(tokens) > kPanel ? query_rows(tokens) : kPanel) * row_length(d))),
        scores(scratch.take(query_rows(tokens) * row_length(tokens))),
        sums(scratch.take(query_rows(tokens) * row_length(d))),
        inverse(scratch.take(query_rows(tokens))) {}
};

// Queries first, ..., last - 1 of one head. o: the head's first channel in the sample; lse: of the head.
template <class T>
DF_KERNEL void attention_forward_queries(const Head<T>& h, T* o, float* lse, int64_t first, int64_t last,
                                         float* memory) {
  const int64_t n = h.tokens, d = h.d, stride = 3 * h.D, ld = row_length(d), wide = row_length(n);
  ForwardRoom room(memory, n, d);
  room.vectors.fill(h);
  for (int64_t t = 0; t < n; t += kPanel) {
    const int64_t rows = n - t < kPanel ? n - t : kPanel;
    pack_plain(h.z + h.D + t * stride, stride, room.queries, ld, rows, d);
    pack_transposed(room.queries, ld, nullptr, room.keys + t * d, rows, d);
  }
  pack_plain(h.z + 2 * h.D, stride, room.values, ld, n, d);
  const int64_t block = query_rows(n);
  for (int64_t t = first; t < last; t += block) {
    const int64_t rows = last - t < block ? last - t : block;
    pack_queries(h.z + t * stride, stride, room.vectors.bias, room.vectors.query, room.queries, ld, rows, d);
    multiply<float>({room.queries, ld, 1}, {room.keys, kPanel, kPanel * d}, room.scores, wide, rows, n, d, false);
    exponentials(room.scores, wide, room.scores, wide, room.inverse, lse + t, rows, n);
    multiply<float>({room.scores, wide, 1}, {room.values, ld, kPanel}, room.sums, ld, rows, d, n, false);
    scale_output(room.sums, ld, room.inverse, room.vectors.value, o + t * h.D, h.D, rows, d);
  }
}

inline int64_t attention_forward_room(int64_t tokens, int64_t d) {
  return ForwardRoom(nullptr, tokens, d).scratch.used;
}

// -- backward --------------------------------------------------------------------------------------------------------
// Keys outside, queries inside: the gradients of a block of keys and values are finished with it, at full depth, and
// only that of the queries is added up in memory. Of the five products only the two that make scores need a transpose,
// a small one of the block; the other two that read p and ds by columns do so as A, which may lie any way.

// delta_t = sum_c dout·o.
template <class T>
DF_KERNEL void row_dots(const T* dout, const T* o, int64_t stride, float* delta, int64_t rows, int64_t d) {
  for (int64_t t = 0; t < rows; ++t) {
    prefetch_row(o + (t + kAhead) * stride, d);
    vf sum = {};
    each(d, [&](int64_t c, auto lanes) DF_LAMBDA {
      sum += load(dout + t * stride + c, lanes) * load(o + t * stride + c, lanes);
    });
    delta[t] = fold_sum(sum);
  }
}

// Scores become probabilities p = exp(s - lse), and ds = p·(dp - delta) takes the place of dp. A row is a query's.
DF_KERNEL void score_gradients(float* p, float* dp, int64_t ld, const float* lse, const float* delta, int64_t rows,
                               int64_t n) {
  for (int64_t t = 0; t < rows; ++t) {
    const vf lse_t = splat(lse[t]), delta_t = splat(delta[t]);
    float *at = p + t * ld, *d_at = dp + t * ld;
    for (int64_t i = 0; i < n; i += W) {  // up to the end of a vector, where the panels of keys and values have zeros
      const vf e = exp_nonpositive(load(at + i, Full{}) - lse_t);
      store(at + i, e, Full{});
      store(d_at + i, e * (load(d_at + i, Full{}) - delta_t), Full{});
    }
  }
}

template <class T>
DF_KERNEL void store_rows(const float* x, int64_t ld, T* to, int64_t stride, int64_t rows, int64_t d) {
  for (int64_t t = 0; t < rows; ++t) {
    prefetch_row(to + (t + kAhead) * stride, d);
    each(d, [&](int64_t c, auto lanes) DF_LAMBDA { store(to + t * stride + c, load(x + t * ld + c, lanes), lanes); });
  }
}

// dz_v = gamma_v·x and dots += x·z_v, x the sums of P^T·dout.
template <int R, class T>
DF_INLINE void store_values_few(const float* x, const float* z, int64_t ld, const float* factor, T* to, int64_t stride,
                                float* dots, int64_t d) {
  for (int r = 0; r < R; ++r) prefetch_row(to + (kAhead + r) * stride, d);
  each(d, [&](int64_t c, auto lanes) DF_LAMBDA {
    const vf f = load(factor + c, lanes);
    vf dot = load(dots + c, lanes);
    for (int r = 0; r < R; ++r) {
      const vf v = load(x + r * ld + c, lanes);
      dot += v * load(z + r * ld + c, lanes);
      store(to + r * stride + c, v * f, lanes);
    }
    store(dots + c, dot, lanes);
  });
}

template <class T>
DF_KERNEL void store_values(const float* x, const float* z, int64_t ld, const float* factor, T* to, int64_t stride,
                            float* dots, int64_t rows, int64_t d) {
  std::memset(dots, 0, d * sizeof(float));
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) {
    store_values_few<4>(x + t * ld, z + t * ld, ld, factor, to + t * stride, stride, dots, d);
  }
  for (; t < rows; ++t) store_values_few<1>(x + t * ld, z + t * ld, ld, factor, to + t * stride, stride, dots, d);
}

struct BackwardRoom {
  Scratch scratch;
  HeadVectors vectors;
  float *queries, *outputs, *delta, *dqueries;  // of the head: d^-1/2·g·(z_q + b), dout, and dS·z_k
  float *keys, *values, *keys_t, *values_t;     // of a block of keys; values_t with gamma_v
  float *dkeys, *dvalues, *p, *ds;              // of a block of keys; p, ds against kQueries queries

  BackwardRoom(float* base, int64_t tokens, int64_t d)
      : scratch{base},
        vectors(scratch, d),
        queries(scratch.take(tokens * row_length(d))),
        outputs(scratch.take(tokens * row_length(d))),
        delta(scratch.take(tokens)),
        dqueries(scratch.take(tokens * row_length(d))),
        keys(scratch.take(kKeyRows * row_length(d))),
        values(scratch.take(kKeyRows * row_length(d))),
        keys_t(scratch.take(panels_size(kKeyRows, d))),
        values_t(scratch.take(panels_size(kKeyRows, d))),
        dkeys(scratch.take(kKeyRows * row_length(d))),
        dvalues(scratch.take(kKeyRows * row_length(d))),
        p(scratch.take(kQueries * row_length(kKeyRows))),
        ds(scratch.take(kQueries * row_length(kKeyRows))) {}
};

inline int64_t attention_backward_room(int64_t tokens, int64_t d) {
  return BackwardRoom(nullptr, tokens, d).scratch.used;
}

// The floats of a head's gradient of the queries: what one block of keys adds to it, where that is kept apart.
inline int64_t attention_slice(int64_t tokens, int64_t d) { return tokens * row_length(d); }

// Blocks of keys of one head, from the first to before the last: gradients of keys and values into dz, the sums of
// (P^T·dout)·z_v of each block (3·D apart), and what each block adds to dS·z_k, `slice` floats apart: added up where
// slice is 0.
template <class T>
DF_INLINE void backward_keys(const Head<T>& h, const T* dout, const T* o, const float* lse, T* dz, float* sums,
                             float* dqueries, int64_t slice, int64_t first, int64_t last, BackwardRoom& room) {
  const int64_t n = h.tokens, d = h.d, stride = 3 * h.D, ld = row_length(d), wide = row_length(kKeyRows);
  room.vectors.fill(h);
  pack_queries(h.z, stride, room.vectors.bias, room.vectors.query, room.queries, ld, n, d);
  pack_plain(dout, h.D, room.outputs, ld, n, d);
  row_dots(dout, o, h.D, room.delta, n, d);
  for (int64_t block = first; block < last; ++block) {
    const int64_t key = block * kKeyRows, rows = n - key < kKeyRows ? n - key : kKeyRows;
    pack_plain(h.z + h.D + key * stride, stride, room.keys, ld, rows, d);
    pack_plain(h.z + 2 * h.D + key * stride, stride, room.values, ld, rows, d);
    pack_transposed(room.keys, ld, nullptr, room.keys_t, rows, d);
    pack_transposed(room.values, ld, room.vectors.value, room.values_t, rows, d);
    for (int64_t t = 0; t < n; t += kQueries) {
      const int64_t some = n - t < kQueries ? n - t : kQueries;
      const float *queries = room.queries + t * ld, *outputs = room.outputs + t * ld;
      for (int64_t i = 0; i < some; i += kQueryRows) {
        const int64_t few = some - i < kQueryRows ? some - i : kQueryRows;
        float *p = room.p + i * wide, *ds = room.ds + i * wide;
        multiply<float>({queries + i * ld, ld, 1}, {room.keys_t, kPanel, kPanel * d}, p, wide, few, rows, d, false);
        multiply<float>({outputs + i * ld, ld, 1}, {room.values_t, kPanel, kPanel * d}, ds, wide, few, rows, d, false);
        score_gradients(p, ds, wide, lse + t + i, room.delta + t + i, few, rows);
      }
      multiply<float>({room.p, 1, wide}, {outputs, ld, kPanel}, room.dvalues, ld, rows, d, some, t > 0);
      multiply<float>({room.ds, 1, wide}, {queries, ld, kPanel}, room.dkeys, ld, rows, d, some, t > 0);
      multiply<float>({room.ds, wide, 1}, {room.keys, ld, kPanel}, dqueries + block * slice + t * ld, ld, some, d, rows,
               slice == 0 && block > 0);
    }
    store_rows(room.dkeys, ld, dz + h.D + key * stride, stride, rows, d);
    store_values(room.dvalues, room.values, ld, room.vectors.value, dz + 2 * h.D + key * stride, stride,
                 sums + (block * 3 + 2) * h.D, rows, d);
  }
}

// The gradient of the queries from the sum of the slices, a = d^-1/2·dS·z_k: dz_q = g·a, and of each kKeyRows queries
// the sums of dz_q and, D floats further, of a·(z_q + b). The sums of the next are 3·D further.
template <int R, class T>
DF_INLINE void store_queries_few(const Head<T>& h, const float* x, int64_t slice, int64_t slices, const T* z, T* dz,
                                 float* sums) {
  const int64_t stride = 3 * h.D, ld = row_length(h.d);
  for (int r = 0; r < R; ++r) {
    prefetch_row(z + (kAhead + r) * stride, h.d);
    prefetch_row(dz + (kAhead + r) * stride, h.d);
  }
  each(h.d, [&](int64_t c, auto lanes) DF_LAMBDA {
    const vf bias = load(h.bias + c, lanes), factor = h.factor ? load(h.factor + c, lanes) : splat(1.0f);
    vf sum = load(sums + c, lanes), dot = load(sums + h.D + c, lanes);
    for (int r = 0; r < R; ++r) {
      vf a = load(x + r * ld + c, lanes);
      for (int64_t k = 1; k < slices; ++k) a += load(x + k * slice + r * ld + c, lanes);
      a *= h.scale;
      dot += a * (load(z + r * stride + c, lanes) + bias);
      a *= factor;
      sum += a;
      store(dz + r * stride + c, a, lanes);
    }
    store(sums + c, sum, lanes);
    store(sums + h.D + c, dot, lanes);
  });
}

template <class T>
DF_KERNEL void attention_backward_queries(const Head<T>& h, const float* x, int64_t slice, int64_t slices, T* dz,
                                          float* sums) {
  const int64_t stride = 3 * h.D, ld = row_length(h.d);
  for (int64_t t = 0; t < h.tokens; sums += 3 * h.D) {
    std::memset(sums, 0, h.d * sizeof(float));
    std::memset(sums + h.D, 0, h.d * sizeof(float));
    const int64_t end = h.tokens - t < kKeyRows ? h.tokens : t + kKeyRows;
    for (; t + 4 <= end; t += 4) {
      store_queries_few<4>(h, x + t * ld, slice, slices, h.z + t * stride, dz + t * stride, sums);
    }
    for (; t < end; ++t) {
      store_queries_few<1>(h, x + t * ld, slice, slices, h.z + t * stride, dz + t * stride, sums);
    }
  }
}

// A whole head.
template <class T>
DF_KERNEL void attention_backward_head(const Head<T>& h, const T* dout, const T* o, const float* lse, T* dz,
                                       float* sums, float* memory) {
  BackwardRoom room(memory, h.tokens, h.d);
  const int64_t blocks = (h.tokens + kKeyRows - 1) / kKeyRows;
  backward_keys(h, dout, o, lse, dz, sums, room.dqueries, 0, 0, blocks, room);
  attention_backward_queries(h, room.dqueries, 0, 1, dz, sums);
}

// Some blocks of keys of a head, each with a slice of its own.
template <class T>
DF_KERNEL void attention_backward_keys(const Head<T>& h, const T* dout, const T* o, const float* lse, T* dz,
                                       float* sums, float* dqueries, int64_t first, int64_t last, float* memory) {
  BackwardRoom room(memory, h.tokens, h.d);
  backward_keys(h, dout, o, lse, dz, sums, dqueries, attention_slice(h.tokens, h.d), first, last, room);
}

}  // namespace difffit::DF_ISA
