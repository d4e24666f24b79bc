// The activations of a memory with their first and second derivatives.
#pragma once
#include "device.cuh"

namespace mal::memory {

// act(z) and act'(z)
MAL_DEVICE void activate(int64_t activation, const float z, float& value, float& slope) {
  if (activation == 0) {
    float cdf = 0.5f * (1 + erff(z * 0.70710678f));
    value = z * cdf;
    slope = cdf + z * 0.39894228f * expf(-0.5f * z * z);
  } else if (activation == 1) {
    float inner = 0.79788456f * z * (1 + 0.044715f * z * z);
    float t = tanhf(inner);
    value = 0.5f * z * (1 + t);
    slope = 0.5f * (1 + t) + 0.5f * z * (1 - t * t) * 0.79788456f * (1 + 0.134145f * z * z);
  } else if (activation == 2) {
    float s = 1 / (1 + expf(-z));
    value = z * s;
    slope = s * (1 + z * (1 - s));
  } else {
    value = z > 0 ? z : 0;
    slope = z > 0 ? 1 : 0;
  }
}

// act''(z)
MAL_DEVICE float curvature(int64_t activation, const float z) {
  if (activation == 0) return 0.39894228f * expf(-0.5f * z * z) * (2 - z * z);
  if (activation == 1) {
    float t = tanhf(0.79788456f * z * (1 + 0.044715f * z * z));
    float inner = 0.79788456f * (1 + 0.134145f * z * z);  // its argument's derivative
    return (1 - t * t) * (inner + z * (0.10703223f * z - t * inner * inner));
  }
  if (activation == 2) {
    float s = 1 / (1 + expf(-z));
    return s * (1 - s) * (2 + z * (1 - 2 * s));
  }
  return 0;
}

}  // namespace mal::memory
