// Matrix products of tiles on tensor cores: wgmma where the target has it, else mma.sync.
#pragma once
#include "neural_memory.h"
#include "tile.cuh"

namespace mal::memory {

// Fragments of operands in shared memory.
template <class AnyTile>
MAL_DEVICE void load(uint32_t (&r)[4], const AnyTile& tile, int row, int column, bool straight,
                     bool transposed) {
  Place p = matrix_row_of(threadIdx.x % 32, straight);
  const void* from = &tile[row + p.row][column + p.column];
  if (transposed)
    load_matrices_transposed(r, from);
  else
    load_matrices(r, from);
}

template <int kDepth, bool kTransposed, int kCount, class A, class B>
MAL_DEVICE void multiply_by_warp(float (&sum)[kCount][4], const A& a, int row, const B& b,
                                 int column) {
  using T = typename A::Number;
#pragma unroll 2
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t fa[4];
    load(fa, a, row, k, true, false);
#pragma unroll
    for (int n = 0; n < kCount; n += 2) {
      uint32_t fb[4];
      if (kTransposed)
        load(fb, b, column + 8 * n, k, false, false);
      else
        load(fb, b, k, column + 8 * n, true, true);
      mma(sum[n], fa, {fb[0], fb[1]}, T());
      mma(sum[n + 1], fa, {fb[2], fb[3]}, T());
    }
  }
}

template <int kDepth, bool kTransposed, int kCount, class A, class B>
MAL_DEVICE void multiply_by_warpgroup(float (&sum)[kCount][4], const A& a, const B& b,
                                      int column) {
  static_assert(A::kRows == 64, "a warpgroup takes 64 rows");
  constexpr Major kMajor = kTransposed ? kMajorK : kMajorMN;
  wgmma_fence(sum);
#pragma unroll
  for (int k = 0; k < kDepth; k += 16)
    wgmma<kMajorK, kMajor>(sum, a.descriptor(0, k),
                           kTransposed ? b.descriptor(column, k) : b.descriptor(k, column),
                           typename A::Number());
  wgmma_commit();
}

// Starts sum[16, 8 kCount] += a[row.., :] b[:, column..]; b is stored [k][n], or [n][k] if
// kTransposed. The four warps of a warpgroup take the rows of a tile of tokens, and the
// same columns.
template <int kDepth, bool kTransposed, int kCount, class A, class B>
MAL_DEVICE void start_multiply(float (&sum)[kCount][4], const A& a, int row, const B& b,
                               int column) {
  if constexpr (kHasWgmma)
    multiply_by_warpgroup<kDepth, kTransposed>(sum, a, b, column);
  else
    multiply_by_warp<kDepth, kTransposed>(sum, a, row, b, column);
}

// Waits for all products that have been started: those to `sum`.
template <int... kCounts>
MAL_DEVICE void finish(float (&... sum)[kCounts][4]) {
  if constexpr (kHasWgmma) wgmma_wait<0>(sum...);
}

template <int kDepth, bool kTransposed, int kCount, class A, class B>
MAL_DEVICE void multiply(float (&sum)[kCount][4], const A& a, int row, const B& b, int column) {
  start_multiply<kDepth, kTransposed>(sum, a, row, b, column);
  finish(sum);
}

// Whether a warpgroup takes 64 of the rows of xᵀ.
template <class X>
constexpr bool kTakesColumns = kHasWgmma && X::kColumns % 64 == 0;

// Starts sum[16, 8 kCount] += xᵀ y, from row and column `part` on, over the tokens of both.
template <int kCount, class X, class Y>
MAL_DEVICE void start_multiply_transposed(float (&sum)[kCount][4], const X& x, const Y& y,
                                          Place part) {
  using T = typename X::Number;
  if constexpr (kTakesColumns<X>) {
    wgmma_fence(sum);
#pragma unroll
    for (int t = 0; t < kTokens; t += 16)
      wgmma<kMajorMN, kMajorMN>(sum, x.descriptor(t, part.row / 64 * 64),
                                y.descriptor(t, part.column), T());
    wgmma_commit();
  } else {
#pragma unroll 1
    for (int t = 0; t < kTokens; t += 16) {
      uint32_t fx[4];
      load(fx, x, t, part.row, false, true);
#pragma unroll
      for (int n = 0; n < kCount; n += 2) {
        uint32_t fy[4];
        load(fy, y, t, part.column + 8 * n, true, true);
        mma(sum[n], fx, {fy[0], fy[1]}, T());
        mma(sum[n + 1], fx, {fy[2], fy[3]}, T());
      }
    }
  }
}

template <int kCount, class X, class Y>
MAL_DEVICE void multiply_transposed(float (&sum)[kCount][4], const X& x, const Y& y, Place part) {
  start_multiply_transposed(sum, x, y, part);
  finish(sum);
}

}  // namespace mal::memory
