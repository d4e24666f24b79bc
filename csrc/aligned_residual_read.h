// Who computes what in aligned_residual_read.cu; for host and device.
#pragma once
#include <stdint.h>

#include "neural_memory.h"

namespace mal::aligned {

using memory::kPad;
using memory::Place;

constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 64, kColumns = 64;  // of a tile of a projection: tokens, and what they become
constexpr int kDepth = 64;                // numbers of a slab, which is summed over at once
constexpr int kTokens = 16;               // that are read from the memory at once
constexpr int kSharing = kThreads / kTokens;  // threads next to each other that share one of them
constexpr int kSplits = kSharing;             // most parts of a sum: one a thread
constexpr int kFeatures = 128;                // most of a head
constexpr int kUnits = 128;                   // hidden units that are alive at once

MAL_LAYOUT constexpr int64_t tiles_of(int64_t size, int tile) { return (size + tile - 1) / tile; }

// A piece of a stage: any block may take it.
struct Item {
  int tile, column, split;
};

MAL_LAYOUT Item item_of(int index, int tiles, int columns) {
  int rest = index / tiles;
  return {index % tiles, rest % columns, rest / columns};
}

// Items of the three stages.
struct Stages {
  int64_t projections, reads, additions;
};

MAL_LAYOUT Stages stages_of(int64_t tokens, int64_t width, int64_t heads, int64_t dim,
                            int64_t splits) {
  int64_t tiles = tiles_of(tokens, kRows);
  return {tiles * 2 * tiles_of(heads * dim, kColumns) * splits, tiles_of(tokens, kTokens) * heads,
          tiles * tiles_of(width, kColumns)};
}

// The first slab of part `split` of a sum; it ends where the next begins.
MAL_LAYOUT int first_slab(int split, int splits, int slabs) { return slabs * split / splits; }

// The 16 bytes of a slab, `numbers` long, that `thread` copies as its `i`th of kRows or kColumns.
MAL_LAYOUT Place copy_of(int thread, int i, int numbers) {
  int index = thread + i * kThreads, each = kDepth / numbers;
  return {index / each, index % each * numbers};
}

// The 32 by 16 numbers of a tile that a warp computes.
MAL_LAYOUT Place part_of(int warp) { return {32 * (warp % 2), 16 * (warp / 2)}; }

// Number `i` of the kFeatures / kSharing that `thread` takes of its token: four at a time.
MAL_LAYOUT Place share_of(int thread, int i) {
  return {thread / kSharing, 4 * (thread % kSharing + i / 4 * kSharing) + i % 4};
}

// Of b[n][k], the first of the two numbers next to each other in k that `lane` has of a fragment.
MAL_LAYOUT Place pair_of(int lane) { return {lane / 4, 2 * (lane % 4)}; }

}  // namespace mal::aligned
