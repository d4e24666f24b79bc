// The activation φ with its first two derivatives, from one exponential each.
#pragma once
#include "vec.h"

namespace mal {

enum Activation { GELU, GELU_TANH, SILU, RELU };

// e^x for x <= 0, to 1e-7 of it; NaN stays.
inline vec exp_of_nonpositive(vec x) {
  x = x < splat(-87.f) ? splat(-87.f) : x;
  const vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  vec n = x * 1.44269504f + magic;
  ivec exponent;
  memcpy(&exponent, &n, sizeof n);
  n -= magic;
  vec r = x - n * 0.693359375f;  // ln 2 in two parts
  r = r - n * -2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const ivec bits = (exponent << 23) + 0x3f800000;  // the low bits of n + magic are n
  vec scale;
  memcpy(&scale, &bits, sizeof bits);
  return p * scale;
}

struct Phi {
  vec value, first, second;  // φ(x), φ'(x), φ''(x)
};

// x Φ(x), with Φ the normal distribution by Abramowitz and Stegun 7.1.26 (to 1.5e-7).
struct Gelu {
  static Phi of(vec x) {
    const vec e = exp_of_nonpositive(-0.5f * x * x);
    const vec t = 1.f / (1.f + 0.3275911f * 0.70710678f * (x < 0.f ? -x : x));
    vec p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vec tail = 0.5f * p * t * e;  // 1 - Φ(|x|)
    const vec cdf = x < 0.f ? tail : 1.f - tail, pdf = 0.39894228f * e;
    return {x * cdf, cdf + x * pdf, pdf * (2.f - x * x)};
  }
};

// 1 / (1 + e^-x), and one minus that without cancellation.
struct Sigmoid {
  vec s, rest;
};
inline Sigmoid sigmoid(vec x) {
  const vec e = exp_of_nonpositive(x < 0.f ? x : -x), p = 1.f / (1.f + e);
  return {x < 0.f ? e * p : p, x < 0.f ? p : e * p};
}

// x s(g) with g = 2 sqrt(2 / π) (x + 0.044715 x³), which is the tanh form of gelu
struct GeluTanh {
  static Phi of(vec x) {
    constexpr float c = 1.5957691216f, cubic = 0.044715f;
    const vec square = x * x;
    const auto [s, rest] = sigmoid(c * x * (1.f + cubic * square));
    const vec g1 = c + (3.f * c * cubic) * square, g2 = (6.f * c * cubic) * x;
    const vec s1 = s * rest * g1, s2 = s * rest * g2 + s1 * g1 * (rest - s);
    return {x * s, s + x * s1, 2.f * s1 + x * s2};
  }
};

struct Silu {
  static Phi of(vec x) {
    const auto [s, rest] = sigmoid(x);
    return {x * s, s * (1.f + x * rest), s * rest * (2.f + x * (rest - s))};
  }
};

struct Relu {
  static Phi of(vec x) {  // NaN stays
    return {x <= 0.f ? vec{} : x, x <= 0.f ? vec{} : splat(1.f), vec{}};
  }
};

template <class A>
inline void activate_as(long n, const float* z, float* value, float* first, float* second) {
  for (long i = 0; i < n; i += VL) {
    const Phi phi = A::of(load(z + i));
    store(value + i, phi.value);
    if (first) store(first + i, phi.first);
    if (second) store(second + i, phi.second);
  }
}

// value = φ(z) of n numbers, and the derivatives where they are wanted; n is a multiple of VL, and
// second may be z itself.
inline void activate(int64_t activation, long n, const float* z, float* value, float* first,
                     float* second) {
  switch (activation) {
    case GELU: return activate_as<Gelu>(n, z, value, first, second);
    case GELU_TANH: return activate_as<GeluTanh>(n, z, value, first, second);
    case SILU: return activate_as<Silu>(n, z, value, first, second);
    default: return activate_as<Relu>(n, z, value, first, second);
  }
}

}  // namespace mal
