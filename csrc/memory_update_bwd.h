// The tiles of a row as memory_update.cu walks them, from the last to the first; for host and device.
#pragma once
#include "memory_update.h"

namespace mal::memory {

struct TileOfRow {
  int token, count;  // its first token, and how many
  int chunk, index;  // its chunk, and which tile of that
};

// The last tile of a row's first `end` tokens; the row begins `start` places inside a chunk.
MAL_LAYOUT TileOfRow last_tile(int end, int start, int chunk) {
  int index_of_chunk = (start + end - 1) / chunk, begin = index_of_chunk * chunk - start;
  if (begin < 0) begin = 0;
  int index = (end - 1 - begin) / kTokens, token = begin + index * kTokens;
  return {token, end - token, index_of_chunk, index};
}

MAL_LAYOUT int tiles_of(int tokens) { return (tokens + kTokens - 1) / kTokens; }

// How many a row has.
MAL_LAYOUT int tiles_of_row(int length, int start, int chunk) {
  int before = (chunk - start) % chunk;  // the rest of a chunk that has begun
  if (before > length) before = length;
  int rest = length - before;
  return tiles_of(before) + rest / chunk * tiles_of(chunk) + tiles_of(rest % chunk);
}

}  // namespace mal::memory
