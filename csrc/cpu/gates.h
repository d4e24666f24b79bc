// Values of gates, checked before anything is computed of them.
#pragma once
#include <float.h>

#include <algorithm>

#include "../mal_kernels.h"

namespace mal {

// Whether all of n numbers are in [0, top]; NaN is not. Without branches, so that it is made of
// vectors.
inline bool within(const float* x, long n, float top) {
  int outside = 0;
  for (long i = 0; x && i < n; i++) outside |= !(x[i] >= 0) | !(x[i] <= top);
  return !outside;
}

inline bool gates_fit(const mal_memory_call& c) {
  const long tokens = c.cu_seqlens ? c.T : c.rows * c.T;
  long gates = c.token_steps ? tokens : c.cu_seqlens ? 0 : c.rows * c.chunk_gates;
  for (long row = 0; !c.token_steps && c.cu_seqlens && row < c.rows; row++) {
    const long length = c.cu_seqlens[row + 1] - c.cu_seqlens[row];
    gates += std::max<long>(1, (length + c.chunk_size - 1) / c.chunk_size);
  }
  return within(c.lr, tokens * c.H, FLT_MAX) && within(c.momentum, gates * c.H, 1) &&
         within(c.decay, gates * c.H, 1);
}

}  // namespace mal
