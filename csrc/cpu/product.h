// Products of small matrices that lie in a core's cache, and their transposes.
#pragma once
#include <algorithm>
#include <utility>

#include "vec.h"

namespace mal {

// A tile of the product: as many sums as the registers hold beside a row of B and a factor of A.
constexpr int ROWS = VL == 16 ? 6 : 4;
constexpr int VECS = VL == 16 ? 4 : 3;

// What of a product is known to be zero or not wanted: of A above (A_LOWER) or below (A_UPPER) its
// diagonal, of C above.
enum Zero { NONE, A_LOWER, A_UPPER, C_LOWER };

// A left factor: element (i, k) at p[i * row + k * column].
struct Left {
  const float* p;
  long row, column;
};
inline Left rows_of(const float* p, long stride) { return {p, stride, 1}; }
inline Left columns_of(const float* p, long stride) { return {p, 1, stride}; }

template <int MR, int NV, bool ADD>
inline void product_tile(long K, Left a, const float* b, long ldb, float* c, long ldc) {
  vec acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) acc[i][j] = ADD ? load(c + i * ldc + j * VL) : vec{};
  for (long k = 0; k < K; k++) {
    vec row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) row[j] = load(b + k * ldb + j * VL);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const vec x = splat(a.p[i * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) acc[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) store(c + i * ldc + j * VL, acc[i][j]);
}

template <int NV, bool ADD>
inline void product_rows(int rows, long K, Left a, const float* b, long ldb, float* c, long ldc) {
  switch (rows) {
    case 1: return product_tile<1, NV, ADD>(K, a, b, ldb, c, ldc);
    case 2: return product_tile<2, NV, ADD>(K, a, b, ldb, c, ldc);
    case 3: return product_tile<3, NV, ADD>(K, a, b, ldb, c, ldc);
    case 4: return product_tile<4, NV, ADD>(K, a, b, ldb, c, ldc);
    case 5: return product_tile<5, NV, ADD>(K, a, b, ldb, c, ldc);
    default: return product_tile<ROWS, NV, ADD>(K, a, b, ldb, c, ldc);
  }
}

// C [M, N] = A B, or C += A B, with B [K, N]; N is a multiple of VL.
template <bool ADD>
void product_to(long M, long N, long K, Left a, const float* b, long ldb, float* c, long ldc,
                Zero zero) {
  for (long j = 0, vecs; j < N; j += vecs * VL) {
    const long left = (N - j) / VL;
    // one vector alone would be a chain of sums too short for the processor
    vecs = left == VECS + 1 ? (VECS + 1) / 2 : std::min<long>(left, VECS);
    for (long i = 0; i < M; i += ROWS) {
      const int rows = M - i < ROWS ? M - i : ROWS;
      if (zero == C_LOWER && j > i + rows - 1) continue;
      const long first = zero == A_UPPER ? i : 0;
      const long count = (zero == A_LOWER && i + rows < K ? i + rows : K) - first;
      const Left from{a.p + i * a.row + first * a.column, a.row, a.column};
      const float* with = b + first * ldb + j;
      float* to = c + i * ldc + j;
      switch (vecs) {
        case 1: product_rows<1, ADD>(rows, count, from, with, ldb, to, ldc); break;
        case 2: product_rows<2, ADD>(rows, count, from, with, ldb, to, ldc); break;
        case 3: product_rows<3, ADD>(rows, count, from, with, ldb, to, ldc); break;
        default: product_rows<VECS, ADD>(rows, count, from, with, ldb, to, ldc);
      }
    }
  }
}

inline void product(long M, long N, long K, Left a, const float* b, long ldb, float* c, long ldc,
                    Zero zero = NONE) {
  product_to<false>(M, N, K, a, b, ldb, c, ldc, zero);
}
inline void add_product(long M, long N, long K, Left a, const float* b, long ldb, float* c,
                        long ldc, Zero zero = NONE) {
  product_to<true>(M, N, K, a, b, ldb, c, ldc, zero);
}

// --- transposes -------------------------------------------------------------------------------

// Lanes of a and b in turn, from lane `from` of both.
#if defined(__clang__)
template <int from, int... I>
inline vec interleaved(vec a, vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (from + I / 2 + I % 2 * VL)...);
}
#else
template <int from, int... I>
inline vec interleaved(vec a, vec b, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(a, b, ivec{(from + I / 2 + I % 2 * VL)...});
}
#endif

// VL x VL in registers: log2(VL) rounds of interleaving rows i and i + VL / 2.
inline void transpose_block(const float* from, long ldf, float* to, long ldt) {
  constexpr std::make_integer_sequence<int, VL> lanes{};
  vec r[VL], s[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) r[i] = load(from + i * ldf);
#pragma GCC unroll 4
  for (int round = 1; round < VL; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < VL / 2; i++) {
      s[2 * i] = interleaved<0>(r[i], r[i + VL / 2], lanes);
      s[2 * i + 1] = interleaved<VL / 2>(r[i], r[i + VL / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) r[i] = s[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) store(to + i * ldt, r[i]);
}

// to [N, M] = the transpose of from [M, N]; both are padded to VL in memory.
inline void transpose(long M, long N, const float* from, long ldf, float* to, long ldt) {
  for (long i = 0; i < M; i += VL)
    for (long j = 0; j < N; j += VL)
      transpose_block(from + i * ldf + j, ldf, to + j * ldt + i, ldt);
}

}  // namespace mal
