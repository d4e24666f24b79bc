// A matrix in shared memory, stored as ldmatrix and wgmma read it.
#pragma once
#include "device.cuh"
#include "swizzle.h"

namespace mal::memory {

// kRows_ x kColumns_ numbers in shared memory: what ldmatrix and wgmma take.
template <class T, int kRows_, int kColumns_>
struct alignas(Swizzle<kRows_, kColumns_>::kPattern) Tile {
  using Number = T;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  using Layout = Swizzle<kRows, kColumns>;

  template <class Numbers>
  struct Row {
    Numbers& numbers;
    int row;
    MAL_DEVICE auto& operator[](int column) const { return numbers[Layout::at(row, column)]; }
  };
  using Numbers = T[kRows * kColumns];
  Numbers numbers;
  MAL_DEVICE Row<Numbers> operator[](int row) { return {numbers, row}; }
  MAL_DEVICE Row<const Numbers> operator[](int row) const { return {numbers, row}; }

  // Of an operand of wgmma that begins there.
  MAL_DEVICE uint64_t descriptor(int row, int column) const {
    return Layout::descriptor(shared_address(numbers), row, column);
  }
};

// `memory`, whose numbers are not needed any more, as something else; it must be aligned for that.
template <class As, class From>
MAL_DEVICE As& in_place_of(From& memory) {
  static_assert(sizeof(As) <= sizeof(From), "does not fit");
  return reinterpret_cast<As&>(memory);
}

}  // namespace mal::memory
