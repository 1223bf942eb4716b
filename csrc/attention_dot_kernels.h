// Rows of attention.cpp for bfloat16 on processors that multiply it as it is (DF_DOTS): every product, with what goes into
// it rounded once to bfloat16 (queries with bias and factors, probabilities, gradients of scores, gamma_v·z_v) and added up
// in float32. Everything between the products is float32, as in attention_kernels.h, which lies below.
//
// A product takes pairs that are consecutive in k. Where k runs along the rows of z, as in the scores, they lie so already.
// Where it runs along the tokens, two rows are folded into one of pairs.
#include "attention_kernels.h"

namespace difffit::DF_ISA {

// -- packing ---------------------------------------------------------------------------------------------------------
// to_t = f(x_t) as bfloat16, zero from the end of a row to the end of its last vector. ld: pairs.
template <class F>
DF_INLINE void round_rows(const bf16* x, int64_t stride, Pair* to, int64_t ld, int64_t rows, int64_t d, F f) {
  for (int64_t t = 0; t < rows; ++t) {
    prefetch_row(x + (t + kAhead) * stride, d);
    bf16* row = reinterpret_cast<bf16*>(to + t * ld);
    each(d, [&](int64_t c, auto lanes) DF_LAMBDA {
      store(row + c, keep(f(load(x + t * stride + c, lanes), c, lanes), lanes), Full{});
    });
  }
}

DF_KERNEL void round_plain(const bf16* x, int64_t stride, Pair* to, int64_t ld, int64_t rows, int64_t d) {
  round_rows(x, stride, to, ld, rows, d, [](vf v, int64_t, auto) DF_LAMBDA { return v; });
}

DF_KERNEL void round_scaled(const bf16* x, int64_t stride, const float* factor, Pair* to, int64_t ld, int64_t rows,
                            int64_t d) {
  round_rows(x, stride, to, ld, rows, d, [&](vf v, int64_t c, auto lanes) DF_LAMBDA { return v * load(factor + c, lanes); });
}

DF_KERNEL void round_queries(const bf16* x, int64_t stride, const float* bias, const float* factor, Pair* to, int64_t ld,
                             int64_t rows, int64_t d) {
  round_rows(x, stride, to, ld, rows, d, [&](vf v, int64_t c, auto lanes) DF_LAMBDA {
    return (v + load(bias + c, lanes)) * load(factor + c, lanes);
  });
}

// Pairs in a scratch memory.
struct PairScratch {
  Scratch& floats;
  Pair* take(int64_t n) { return reinterpret_cast<Pair*>(floats.take(n)); }
};

// -- forward ---------------------------------------------------------------------------------------------------------
struct DotForwardRoom {
  Scratch scratch;
  HeadVectors vectors;
  PairScratch two{scratch};
  Pair *keys, *values, *rows, *p;  // rows: queries, or what is to be transposed or folded
  float *scores, *sums, *inverse;

  static int64_t some(int64_t tokens) { return query_rows(tokens) > kPanel ? query_rows(tokens) : kPanel; }

  DotForwardRoom(float* base, int64_t tokens, int64_t d)
      : scratch{base},
        vectors(scratch, d),
        keys(two.take(panels_size(tokens, pairs(d)))),
        values(two.take(pairs(tokens) * row_length(d))),
        rows(two.take(some(tokens) * row_length(pairs(d)))),
        p(two.take(query_rows(tokens) * row_length(pairs(tokens)))),
        scores(scratch.take(query_rows(tokens) * row_length(tokens))),
        sums(scratch.take(query_rows(tokens) * row_length(d))),
        inverse(scratch.take(query_rows(tokens))) {}
};

// As attention_forward_queries.
DF_KERNEL void dot_forward_queries(const Head<bf16>& h, bf16* o, float* lse, int64_t first, int64_t last, float* memory) {
  const int64_t n = h.tokens, d = h.d, d2 = pairs(d), n2 = pairs(n), stride = 3 * h.D;
  const int64_t ld = row_length(d), ld2 = row_length(d2), wide = row_length(n), wide2 = row_length(n2);
  DotForwardRoom room(memory, n, d);
  room.vectors.fill(h);
  for (int64_t t = 0; t < n; t += kPanel) {
    const int64_t rows = n - t < kPanel ? n - t : kPanel;
    round_plain(h.z + h.D + t * stride, stride, room.rows, ld2, rows, d);
    transpose_pairs(room.rows, ld2, room.keys + t * d2, rows, d2);
    round_plain(h.z + 2 * h.D + t * stride, stride, room.rows, ld2, rows, d);
    fold_rows(room.rows, ld2, room.values + t / 2 * ld, ld, rows, d);
  }
  const int64_t block = query_rows(n);
  for (int64_t t = first; t < last; t += block) {
    const int64_t rows = last - t < block ? last - t : block;
    round_queries(h.z + t * stride, stride, room.vectors.bias, room.vectors.query, room.rows, ld2, rows, d);
    multiply<Pair>({room.rows, ld2, 1}, {room.keys, kPanel, kPanel * d2}, room.scores, wide, rows, n, d2, false);
    exponentials(room.scores, wide, reinterpret_cast<bf16*>(room.p), 2 * wide2, room.inverse, lse + t, rows, n);
    multiply<Pair>({room.p, wide2, 1}, {room.values, ld, kPanel}, room.sums, ld, rows, d, n2, false);
    scale_output(room.sums, ld, room.inverse, room.vectors.value, o + t * h.D, h.D, rows, d);
  }
}

inline int64_t dot_forward_room(int64_t tokens, int64_t d) { return DotForwardRoom(nullptr, tokens, d).scratch.used; }

// -- backward --------------------------------------------------------------------------------------------------------
// Two rows of scores, of which the second may not be there (R = 1): p = exp(s - lse) and ds = p·(dp - delta), rounded, folded
// and, of ds, as rows too. They go up to the end of a vector, where the panels of keys and values have zeros.
template <int R>
DF_INLINE void dot_gradients_few(const float* s, const float* dp, int64_t ld, const float* lse, const float* delta, Pair* p,
                                 Pair* ds, bf16* rows, int64_t rows_ld, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    vf e[2] = {}, g[2] = {};
    for (int r = 0; r < R; ++r) {
      e[r] = exp_nonpositive(load(s + r * ld + i, Full{}) - lse[r]);
      g[r] = e[r] * (load(dp + r * ld + i, Full{}) - delta[r]);
    }
    store(p + i, round_pairs(e[0], e[1]));
    const vu both = round_pairs(g[0], g[1]);
    store(ds + i, both);
    for (int r = 0; r < R; ++r) {
      const vh half = narrow(r == 0 ? both & 0xffffu : both >> 16);
      std::memcpy(rows + r * rows_ld + i, &half, sizeof half);
    }
  }
}

DF_KERNEL void dot_gradients(const float* s, const float* dp, int64_t ld, const float* lse, const float* delta, Pair* p,
                             Pair* ds, int64_t folded, Pair* rows, int64_t rows_ld, int64_t count, int64_t n) {
  bf16* to = reinterpret_cast<bf16*>(rows);
  int64_t t = 0;
  for (; t + 2 <= count; t += 2, p += folded, ds += folded) {
    dot_gradients_few<2>(s + t * ld, dp + t * ld, ld, lse + t, delta + t, p, ds, to + 2 * t * rows_ld, 2 * rows_ld, n);
  }
  if (t < count) {
    dot_gradients_few<1>(s + t * ld, dp + t * ld, ld, lse + t, delta + t, p, ds, to + 2 * t * rows_ld, 2 * rows_ld, n);
  }
  if (n % 2) {  // what stands behind the last key is no gradient, and would meet a zero
    for (t = 0; t < count; ++t) rows[t * rows_ld + n / 2].bits &= 0xffffu;
  }
}

struct DotBackwardRoom {
  Scratch scratch;
  HeadVectors vectors;
  PairScratch two{scratch};
  Pair *queries, *outputs, *folded_queries, *folded_outputs;  // of the head: d^-1/2·g·(z_q + b), and dout
  float *delta, *dqueries;
  float* values;                                                // of a block of keys
  Pair *rows, *folded_keys, *keys_t, *values_t, *p, *ds, *ds_rows;  // values_t with gamma_v; p, ds against kQueries queries
  float *dkeys, *dvalues, *scores, *dscores;                    // scores: of kQueryRows queries

  DotBackwardRoom(float* base, int64_t tokens, int64_t d)
      : scratch{base},
        vectors(scratch, d),
        queries(two.take(tokens * row_length(pairs(d)))),
        outputs(two.take(tokens * row_length(pairs(d)))),
        folded_queries(two.take(pairs(tokens) * row_length(d))),
        folded_outputs(two.take(pairs(tokens) * row_length(d))),
        delta(scratch.take(tokens)),
        dqueries(scratch.take(tokens * row_length(d))),
        values(scratch.take(kKeyRows * row_length(d))),
        rows(two.take(kKeyRows * row_length(pairs(d)))),
        folded_keys(two.take(pairs(kKeyRows) * row_length(d))),
        keys_t(two.take(panels_size(kKeyRows, pairs(d)))),
        values_t(two.take(panels_size(kKeyRows, pairs(d)))),
        p(two.take(pairs(kQueries) * row_length(kKeyRows))),
        ds(two.take(pairs(kQueries) * row_length(kKeyRows))),
        ds_rows(two.take(kQueries * row_length(pairs(kKeyRows)))),
        dkeys(scratch.take(kKeyRows * row_length(d))),
        dvalues(scratch.take(kKeyRows * row_length(d))),
        scores(scratch.take(kQueryRows * row_length(kKeyRows))),
        dscores(scratch.take(kQueryRows * row_length(kKeyRows))) {}
};

inline int64_t dot_backward_room(int64_t tokens, int64_t d) { return DotBackwardRoom(nullptr, tokens, d).scratch.used; }

// As backward_keys.
DF_INLINE void dot_backward_blocks(const Head<bf16>& h, const bf16* dout, const bf16* o, const float* lse, bf16* dz,
                                   float* sums, float* dqueries, int64_t slice, int64_t first, int64_t last,
                                   DotBackwardRoom& room) {
  const int64_t n = h.tokens, d = h.d, d2 = pairs(d), stride = 3 * h.D;
  const int64_t ld = row_length(d), ld2 = row_length(d2), wide = row_length(kKeyRows), wide2 = row_length(pairs(kKeyRows));
  room.vectors.fill(h);
  round_queries(h.z, stride, room.vectors.bias, room.vectors.query, room.queries, ld2, n, d);
  fold_rows(room.queries, ld2, room.folded_queries, ld, n, d);
  round_plain(dout, h.D, room.outputs, ld2, n, d);
  fold_rows(room.outputs, ld2, room.folded_outputs, ld, n, d);
  row_dots(dout, o, h.D, room.delta, n, d);
  for (int64_t block = first; block < last; ++block) {
    const int64_t key = block * kKeyRows, rows = n - key < kKeyRows ? n - key : kKeyRows;
    const bf16 *keys = h.z + h.D + key * stride, *values = h.z + 2 * h.D + key * stride;
    round_scaled(values, stride, room.vectors.value, room.rows, ld2, rows, d);
    transpose_pairs(room.rows, ld2, room.values_t, rows, d2);
    round_plain(keys, stride, room.rows, ld2, rows, d);
    transpose_pairs(room.rows, ld2, room.keys_t, rows, d2);
    fold_rows(room.rows, ld2, room.folded_keys, ld, rows, d);
    for (int64_t t = 0; t < n; t += kQueries) {
      const int64_t some = n - t < kQueries ? n - t : kQueries;
      for (int64_t i = 0; i < some; i += kQueryRows) {
        const int64_t few = some - i < kQueryRows ? some - i : kQueryRows;
        multiply<Pair>({room.queries + (t + i) * ld2, ld2, 1}, {room.keys_t, kPanel, kPanel * d2}, room.scores, wide, few,
                       rows, d2, false);
        multiply<Pair>({room.outputs + (t + i) * ld2, ld2, 1}, {room.values_t, kPanel, kPanel * d2}, room.dscores, wide,
                       few, rows, d2, false);
        dot_gradients(room.scores, room.dscores, wide, lse + t + i, room.delta + t + i, room.p + i / 2 * wide,
                      room.ds + i / 2 * wide, wide, room.ds_rows + i * wide2, wide2, few, rows);
      }
      const Pair *outputs = room.folded_outputs + t / 2 * ld, *queries = room.folded_queries + t / 2 * ld;
      multiply<Pair>({room.p, 1, wide}, {outputs, ld, kPanel}, room.dvalues, ld, rows, d, pairs(some), t > 0);
      multiply<Pair>({room.ds, 1, wide}, {queries, ld, kPanel}, room.dkeys, ld, rows, d, pairs(some), t > 0);
      multiply<Pair>({room.ds_rows, wide2, 1}, {room.folded_keys, ld, kPanel}, dqueries + block * slice + t * ld, ld, some,
                     d, pairs(rows), slice == 0 && block > 0);
    }
    store_rows(room.dkeys, ld, dz + h.D + key * stride, stride, rows, d);
    pack_plain(values, stride, room.values, ld, rows, d);
    store_values(room.dvalues, room.values, ld, room.vectors.value, dz + 2 * h.D + key * stride, stride,
                 sums + (block * 3 + 2) * h.D, rows, d);
  }
}

// As attention_backward_head and attention_backward_keys; attention_backward_queries is the same for both.
DF_KERNEL void dot_backward_head(const Head<bf16>& h, const bf16* dout, const bf16* o, const float* lse, bf16* dz,
                                 float* sums, float* memory) {
  DotBackwardRoom room(memory, h.tokens, h.d);
  dot_backward_blocks(h, dout, o, lse, dz, sums, room.dqueries, 0, 0, (h.tokens + kKeyRows - 1) / kKeyRows, room);
  attention_backward_queries(h, room.dqueries, 0, 1, dz, sums);
}

DF_KERNEL void dot_backward_keys(const Head<bf16>& h, const bf16* dout, const bf16* o, const float* lse, bf16* dz,
                                 float* sums, float* dqueries, int64_t first, int64_t last, float* memory) {
  DotBackwardRoom room(memory, h.tokens, h.d);
  dot_backward_blocks(h, dout, o, lse, dz, sums, dqueries, attention_slice(h.tokens, h.d), first, last, room);
}

}  // namespace difffit::DF_ISA
