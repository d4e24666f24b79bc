// Numbers of PTX's types as they stand in a register of 64 bits.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>

#include "machine.h"

namespace ptx {

inline float to_f32(u64 x) { return std::bit_cast<float>(static_cast<u32>(x)); }
inline u64 of_f32(float x) { return std::bit_cast<u32>(x); }
inline double to_f64(u64 x) { return std::bit_cast<double>(x); }
inline u64 of_f64(double x) { return std::bit_cast<u64>(x); }
inline float to_bf16(u64 x) { return std::bit_cast<float>(static_cast<u32>(x & 0xffff) << 16); }
inline float to_f16(u64 x) {
  return static_cast<float>(std::bit_cast<_Float16>(static_cast<u16>(x)));
}
inline u64 of_bf16(float x) {
  if (x != x) return 0x7fff;
  u32 bits = std::bit_cast<u32>(x);
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u64 of_f16(float x) { return std::bit_cast<u16>(static_cast<_Float16>(x)); }

// of f32 and the types below it
inline float to_float(int type, u64 x) {
  return type == T_bf16 ? to_bf16(x) : type == T_f16 ? to_f16(x) : to_f32(x);
}
inline u64 of_float(int type, float x) {
  return type == T_bf16 ? of_bf16(x) : type == T_f16 ? of_f16(x) : of_f32(x);
}

inline float flushed(float x) {
  return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x;
}

inline bool is_signed(int type) {
  return type == T_s8 || type == T_s16 || type == T_s32 || type == T_s64;
}
inline bool is_small_float(int type) { return type == T_f32 || type == T_f16 || type == T_bf16; }
inline bool is_float(int type) { return is_small_float(type) || type == T_f64; }
inline bool is_pair(int type) { return type == T_bf16x2 || type == T_f16x2; }
inline int half_of(int pair) { return pair == T_bf16x2 ? T_bf16 : T_f16; }

inline u64 low_bits(int bits) { return bits >= 64 ? ~0ull : (1ull << bits) - 1; }

// The bits of the type alone.
inline u64 unsigned_of(int type, u64 x) {
  return type == T_pred ? x & 1 : x & low_bits(8 * kBytes[type]);
}
inline i64 signed_of(int type, u64 x) {
  int unused = 64 - 8 * kBytes[type];
  return static_cast<i64>(x << unused) >> unused;
}
// Widened as its type says.
inline u64 widened(int type, u64 x) {
  return is_signed(type) ? static_cast<u64>(signed_of(type, x)) : unsigned_of(type, x);
}

// x op y; `flush`: subnormals are zero. Throws for what it does not know.
u64 binary(int op, int type, u64 x, u64 y, bool flush);
u64 fused(int type, u64 x, u64 y, u64 z, bool flush, bool down);
bool compare(int comparison, int type, u64 x, u64 y, bool flush);

enum Rounding { kNearest, kInteger, kZero, kDown, kUp };  // to an integer, but for the first
u64 convert(int to, int from, u64 x, int rounding, bool saturates);

}  // namespace ptx
