// Which thread holds what in neural_memory_fwd.cu, and what it loads; for host and device.
#pragma once
#include "layout.h"

namespace mal::memory {

constexpr int kTokens = 64;    // of a tile
constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr int kSharing = kThreads / kTokens;  // threads next to each other that share a token
constexpr int kPad = 8;  // 16-bit numbers behind a row: eight rows then lie in all 32 banks

// Hidden units of a block, for at most `features` features: W and S of both layers are then 64
// numbers a thread.
MAL_LAYOUT constexpr int units_for(int features) { return 4096 / features; }

struct Place {
  int row, column;
};

// A warp's part of a product whose rows are shared out among `groups` of warps, 16 rows each.
MAL_LAYOUT Place part_of(int warp, int groups, int width) {
  return {16 * (warp % groups), width * (warp / groups)};
}

// Number `i` of the fragment that `lane` holds of a 16 x 8 product (PTX, mma.m16n8k16).
MAL_LAYOUT Place accumulator_of(int lane, int i) {
  return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2};
}

// The row of eight numbers whose address `lane` gives to ldmatrix, for four matrices that become
// the fragment of a 16 x 16 operand a[m][k], or of two 16 x 8 operands b[k][n] next to each other.
// `straight`: of a stored [m][k], or of b stored [k][n] and transposed; else of a stored [k][m] and
// transposed, or of b stored [n][k].
MAL_LAYOUT Place matrix_row_of(int lane, bool straight) {
  return straight ? Place{lane % 16, 8 * (lane / 16)}
                  : Place{lane % 8 + 8 * (lane / 16), 8 * (lane / 8 % 2)};
}

// The 16 bytes of a tile [kTokens, width] that `thread` copies as its `i`th.
MAL_LAYOUT Place copy_of(int thread, int i, int width) {
  int index = thread + i * kThreads, each = width / 8;
  return {index / each, index % each * 8};
}

// Number `i` of the width / kSharing that `thread` takes of its token: four columns at a time.
MAL_LAYOUT Place share_of(int thread, int i) {
  return {thread / kSharing, 4 * (thread % kSharing + i / 4 * kSharing) + i % 4};
}

// The block of a cluster of `blocks` that sums and stores what a token reads: one for all of a warp,
// whose threads take 32 / kSharing tokens.
MAL_LAYOUT int block_of(int token, int blocks) {
  return token * (blocks < kWarps ? blocks : kWarps) / kTokens;
}

// Tokens of a row from `token` on that make a tile: up to the end of their chunk or of the row.
MAL_LAYOUT int tile_length(int token, int place_in_chunk, int chunk, int length) {
  int most = kTokens;
  if (chunk - place_in_chunk < most) most = chunk - place_in_chunk;
  if (length - token < most) most = length - token;
  return most;
}

// Blocks of a cluster that holds `hidden` units, `units` in each; 0: there is no place for them.
MAL_LAYOUT int blocks_for(int64_t hidden, int units) {
  int blocks = 1;
  while (blocks * units < hidden) blocks *= 2;
  return blocks <= 16 ? blocks : 0;  // more than 8 do not fit every GPU that has clusters
}

}  // namespace mal::memory
