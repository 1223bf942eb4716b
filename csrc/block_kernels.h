// Units of block.cpp: some rows of one sample; included once for each instruction set. What a unit makes for itself (h between
// the joins, GELU's output, dbranch, du) stays in the second-level cache.
#include "frozen_mlp_kernels.h"
#include "residual_kernels.h"

namespace difffit::DF_ISA {

// The pieces of a unit's memory: the MLP's, two rows of H and one of X a row, and a product's result where H is rounded.
template <class X, class H>
struct BlockRoom {
  float* mlp;
  H *first, *second;
  X* stream;
  float* result;
  int64_t used;

  BlockRoom(float* memory, int64_t rows, int64_t D) : used(0) {
    const auto take = [&](int64_t bytes) {
      float* piece = memory ? memory + used : nullptr;
      used += (bytes + 63) / 64 * 16;
      return piece;
    };
    mlp = take(mlp_room<H>(rows, D) * sizeof(float));
    first = reinterpret_cast<H*>(take(rows * D * sizeof(H)));
    second = reinterpret_cast<H*>(take(rows * D * sizeof(H)));
    stream = reinterpret_cast<X*>(take(rows * D * sizeof(X)));
    result = take(std::is_same_v<H, float> ? 0 : rows * D * sizeof(float));
  }
};

template <class X, class H>
inline int64_t block_room(int64_t rows, int64_t D) {
  return BlockRoom<X, H>(nullptr, rows, D).used;
}

// y (rows, n) = x (rows, k)·w, with the weight in panels. result: rows·n floats, if y is rounded.
template <class E>
DF_KERNEL void product_rows(const E* x, const float* panels, E* y, float* memory, int64_t rows, int64_t n, int64_t k) {
  float* result = result_of(y, memory);
  multiply_packed(x, k, panels, k, result, n, rows, n, k, false);
  round_result(result, y, rows * n);
}

// From attention's output to the next block: proj, join, MLP, join, of the rows from k.row on.
template <class X, class H, bool kBare>
DF_KERNEL void block_forward_rows(const BlockForward<X, H>& a, const Chunk& k, float* memory) {
  const int64_t D = a.D, F = a.F, at = k.row * D, v = k.sample * D, row = k.row;
  const BlockRoom<X, H> room(memory, k.rows, D);
  product_rows(a.o + at, a.proj, a.branch1 + at, room.result, k.rows, D, D);
  const auto join = [&](const Join& j, const X* x, const H* branch, X* y, H* h) DF_LAMBDA {
    residual_adaln_forward_chunk(x, branch, j.gate + v, j.bias + v, j.scale + v, j.shift + v, a.eps, y, h, j.mean + row,
                                 j.rstd + row, k.rows, D);
  };
  join(a.join1, a.x + at, a.branch1 + at, a.y1 + at, room.first);
  mlp_forward_rows<H, kBare>(room.first, a.fc1, a.bias1 + (kBare ? k.sample * F : 0), a.fc2, a.u + row * F, a.branch2 + at,
                             room.mlp, k.rows, D, F);
  join(a.join2, a.y1 + at, a.branch2 + at, a.y2 + at, a.h2 + at);
}

// Its backward: from dh and, where there is one (kDy), dy to dx and the gradient of attention's output.
template <class X, class H, bool kBare, bool kDy>
DF_KERNEL void block_backward_rows(const BlockBackward<X, H>& a, const Chunk& k, float* memory) {
  const int64_t D = a.D, F = a.F, at = k.row * D, v = k.sample * D, row = k.row;
  const BlockRoom<X, H> room(memory, k.rows, D);
  const auto join = [&](auto has_dy, const Join& j, const H* dh, const X* dy, const X* y, const H* branch, X* dx,
                        float* sums) DF_LAMBDA {
    for (int64_t t = 0; t < k.rows; t += kChunkRows) {
      residual_adaln_backward_chunk<decltype(has_dy)::value>(
          dh + t * D, dy + t * D, y + t * D, branch + t * D, j.gate + v, j.scale + v, j.mean + row + t, j.rstd + row + t,
          dx + t * D, room.first + t * D, sums + (k.index + t / kChunkRows) * 4 * D,
          k.rows - t < kChunkRows ? k.rows - t : kChunkRows, D);
    }
  };
  join(std::bool_constant<kDy>{}, a.join2, a.dh + at, (kDy ? a.dy : a.y2) + at, a.y2 + at, a.branch2 + at, room.stream,
       a.sums2);
  mlp_backward_rows<H, kBare>(room.first, a.fc1, a.fc2, a.u + row * F, kBare ? a.bias1 + k.sample * F : nullptr,
                              room.second, a.dbias1 + k.index * F, room.mlp, k.rows, D, F);
  join(std::true_type{}, a.join1, room.second, room.stream, a.y1 + at, a.branch1 + at, a.dx + at, a.sums1);
  product_rows(room.first, a.proj, a.dout + at, room.result, k.rows, D, D);
}

}  // namespace difffit::DF_ISA
