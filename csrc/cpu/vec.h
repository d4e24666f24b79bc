// Vectors of floats in the vector extension of GCC and Clang: the same text compiles to AVX-512,
// AVX2 or NEON. Rows lie in memory padded to whole vectors; what stands in the padding is anything
// finite or not, so that sums over a row leave it out.
#pragma once
#include <stdint.h>
#include <string.h>

namespace mal {

#if defined(MAL_LANES)
constexpr int VL = MAL_LANES;
#elif defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
typedef float vec __attribute__((vector_size(4 * VL)));
typedef int32_t ivec __attribute__((vector_size(4 * VL)));

inline long padded(long n) { return (n + VL - 1) / VL * VL; }

inline vec load(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
inline vec splat(float x) { return x - vec{}; }  // 0 + x is an addition: it makes 0 of -0

// The lanes below n of x, and zero in the others, whatever x holds there.
inline vec first_lanes(long n, vec x) {
  if (n >= VL) return x;
  ivec lane;
  for (int i = 0; i < VL; i++) lane[i] = i;
  return lane < ivec{} + int32_t(n) ? x : vec{};
}

inline float sum(vec v) {
  float lanes[VL];
  memcpy(lanes, &v, sizeof v);
  for (int width = VL / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

// --- rows of n numbers ----------------------------------------------------------------------

inline float row_sum(const float* a, long n) {
  vec total{};
  for (long i = 0; i < n; i += VL) total += first_lanes(n - i, load(a + i));
  return sum(total);
}

inline float row_dot(const float* a, const float* b, long n) {
  vec total{};
  for (long i = 0; i < n; i += VL) total += first_lanes(n - i, load(a + i) * load(b + i));
  return sum(total);
}

// to = sign scale_t x_t for every row t of `stride`
inline void scale_rows(long rows, long stride, const float* x, const float* scale, float sign,
                       float* to) {
  for (long t = 0; t < rows; t++)
    for (long i = t * stride; i < (t + 1) * stride; i += VL)
      store(to + i, sign * scale[t] * load(x + i));
}

}  // namespace mal
