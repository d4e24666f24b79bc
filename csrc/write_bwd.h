// The tiles of a row as neural_memory_fwd.cu walks them, from the last to the first; for host and device.
#pragma once
#include "neural_memory.h"

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

// Its tile `n`, from the first on.
MAL_LAYOUT TileOfRow tile_of_row(int n, int length, int start, int chunk) {
  int before = (chunk - start) % chunk, in_first = tiles_of(before < length ? before : length);
  int begin = 0, behind = before, of_chunk = 0;  // of the tile's chunk
  if (n >= in_first) {
    int chunks = (n - in_first) / tiles_of(chunk);
    n = (n - in_first) % tiles_of(chunk);
    of_chunk = chunks + (start > 0);
    begin = before + chunks * chunk, behind = begin + chunk;
  }
  if (behind > length) behind = length;
  int token = begin + n * kTokens, count = behind - token;
  return {token, count < kTokens ? count : kTokens, of_chunk, n};
}

}  // namespace mal::memory
