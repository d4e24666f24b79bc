// Who computes what in momentum_scan.cu; for host and device.
#pragma once
#include "layout.h"

namespace mal::scan {

constexpr int kThreads = 128;
constexpr int kFeatures = 4;  // that a thread holds, next to each other: 16 bytes of float32

// A block takes `lanes * kFeatures` features of one row's head, and of a tile of tokens each of its
// `steps` groups of `lanes` threads takes a few tokens, one group after the other in time. Many
// features leave no thread for a second group: then time is walked, and nothing is exchanged.
struct Shape {
  int lanes, steps;
  int64_t blocks;  // along the features
};

MAL_LAYOUT Shape shape_of(int64_t features) {
  int lanes = 4;
  while (lanes < kThreads && int64_t{lanes} * kFeatures < features) lanes *= 2;
  int64_t width = int64_t{lanes} * kFeatures;
  return {lanes, kThreads / lanes, (features + width - 1) / width};
}

// What block `index` computes.
struct Place {
  int64_t row, head, block;
};

MAL_LAYOUT Place place_of(int64_t index, int64_t blocks, int64_t heads) {
  int64_t rest = index / blocks;
  return {rest / heads, rest % heads, index % blocks};
}

// The token that `step` takes as its `i`th of a tile, counted from the row's first (or, walking
// back, from its last).
MAL_LAYOUT int64_t token_of(int64_t tile, int step, int i, int each) {
  return tile + int64_t{step} * each + i;
}

}  // namespace mal::scan
