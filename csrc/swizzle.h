// Where the numbers of a tile stand in shared memory, and what wgmma is told of it; for host and
// device.
#pragma once
#include "layout.h"

namespace mal {

// A tile of 16-bit numbers in PTX's swizzling mode of 128 bytes, or of 64 where a row has no more.
// Columns are taken 64 (or 32) at a time: such parts of the tile stand one behind the other. In a
// part a row's chunks of 16 bytes change places, so that one chunk of eight rows lies in all banks.
template <int kRows, int kColumns>
struct Swizzle {
  static constexpr int kPart = kColumns < 64 ? kColumns : 64;
  static constexpr int kPattern = 8 * 2 * kPart;  // bytes; a tile stands at a multiple of them
  static_assert(kPart == 64 || kPart == 32, "no swizzling mode is this wide");
  static_assert(kColumns % kPart == 0 && kRows % 8 == 0, "a pattern is cut");

  // The index of a number.
  static MAL_LAYOUT constexpr unsigned at(unsigned row, unsigned column) {
    return straight(row, column ^ 8 * (row * kPart / 64 % (kPart / 8)));
  }

  // What it were if no chunk changed places.
  static MAL_LAYOUT constexpr unsigned straight(unsigned row, unsigned column) {
    if (kColumns == kPart) return row * kPart + column;
    return (column / kPart * kRows + row) * kPart + column % kPart;
  }

  // The matrix descriptor of an operand whose first number is that of `row`, a multiple of 8, and
  // `column`, of a tile at `address`. It says all that either major order needs: how far apart two
  // parts are, which matters where the operand's rows are its k, and how far eight rows.
  static MAL_LAYOUT constexpr uint64_t descriptor(uint32_t address, unsigned row,
                                                  unsigned column) {
    constexpr uint64_t kLeading = kRows * kPart / 8, kStride = kPattern / 16;
    constexpr uint64_t kMode = kPart == 64 ? 1 : 2;
    uint32_t start = (address & 0x3FFFF) / 16 + straight(row, column) / 8;  // 14 bits
    return start | kLeading << 16 | kStride << 32 | kMode << 62;
  }
};

}  // namespace mal
