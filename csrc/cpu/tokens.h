// Tokens of one row and head: [C, D] of float32, float16 or bfloat16 to padded float32 and back.
//
// The conversions are arithmetic of integers, without branches, so that compilers make vectors of
// them and flushed denormals do not matter.
#pragma once
#include "../mal_kernels.h"
#include "vec.h"

namespace mal {

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

struct Bfloat16 {
  static float widen(uint16_t x) { return as_float(uint32_t(x) << 16); }
  static uint16_t narrow(float x) {  // to nearest, ties to even
    const uint32_t bits = as_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
  }
};

struct Float16 {
  static float widen(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, magnitude = x & 0x7fff;
    const uint32_t special = magnitude >= 0x7c00 ? 112u << 23 : 0;  // infinity and NaN
    const float normal = as_float((magnitude << 13) + (112u << 23) + special);
    const float subnormal = float(int32_t(magnitude)) * 5.9604645e-8f;  // times 2^-24
    return as_float(sign | as_bits(magnitude < 0x400 ? subnormal : normal));
  }
  static uint16_t narrow(float x) {  // to nearest, ties to even
    const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // adding 0.5 rounds to multiples of 2^-24
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    const uint32_t finite = magnitude < 113u << 23 ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return uint16_t(sign | (magnitude >= 0x477ff000 ? special : finite));  // 65520 rounds up
  }
};

template <class F>
inline void widen_rows(const void* from, long first, long stride, long C, long D, float* to,
                       long ldt) {
  for (long t = 0; t < C; t++) {
    const uint16_t* x = static_cast<const uint16_t*>(from) + first + t * stride;
    for (long d = 0; d < D; d++) to[t * ldt + d] = F::widen(x[d]);
  }
}

template <class F>
inline void narrow_rows(const float* from, long ldf, long C, long D, void* to, long first,
                        long stride) {
  for (long t = 0; t < C; t++) {
    uint16_t* y = static_cast<uint16_t*>(to) + first + t * stride;
    for (long d = 0; d < D; d++) y[d] = F::narrow(from[t * ldf + d]);
  }
}

// to [C, D] = tokens that stand `stride` apart from element `first` on
inline void pack(int64_t dtype, const void* from, long first, long stride, long C, long D,
                 float* to, long ldt) {
  if (dtype == MAL_BFLOAT16) return widen_rows<Bfloat16>(from, first, stride, C, D, to, ldt);
  if (dtype == MAL_FLOAT16) return widen_rows<Float16>(from, first, stride, C, D, to, ldt);
  for (long t = 0; t < C; t++)
    memcpy(to + t * ldt, static_cast<const float*>(from) + first + t * stride, 4 * D);
}

// the inverse of pack
inline void unpack(int64_t dtype, const float* from, long ldf, long C, long D, void* to,
                   long first, long stride) {
  if (dtype == MAL_BFLOAT16) return narrow_rows<Bfloat16>(from, ldf, C, D, to, first, stride);
  if (dtype == MAL_FLOAT16) return narrow_rows<Float16>(from, ldf, C, D, to, first, stride);
  for (long t = 0; t < C; t++)
    memcpy(static_cast<float*>(to) + first + t * stride, from + t * ldf, 4 * D);
}

}  // namespace mal
