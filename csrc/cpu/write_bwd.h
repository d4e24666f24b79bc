// The gradients of a tile's write (see tile.h), given dW', dS' of the state after it. For each
// layer and (r, G) = (w_C rate, dW'), (E_C rate, dS')
//
//   dδ -= r X G,  dX -= (r δ) Gᵀ,  dr -= rowsum(X G ⊙ δ)
//   dβ_C += <dW', W - I>,  df_C += <dW', S>,  dε_C += <dS', S>,  dI += (1 - β_C) dW'
//   dW = β_C dW',  dS = f_C dW' + ε_C dS'
//
// and with chunk steps T = dS' + dW' where the chunk closes, (r, G) = (rate, T), dS = η T where it
// opens, dη = <T, S>, dα = <dW', I - W>, dW = (1 - α) dW', dI += α dW'.
#pragma once
#include "gradients.h"

namespace mal {

// Through `to -= Σ_s r_s X_sᵀ δ_s`, given G, the gradient of `to`, into that of r.
inline void descend_bwd(const Task& k, Tile& t, Gradients& d, const float* r, Memory G,
                        float* d_r) {
  transpose_memory(k.shape, G, d.GT);
  for (int l = k.shape.begin; l < k.shape.end; l++) {
    const Layer& y = k.shape.layer[l];
    product(t.C, y.stride, y.in, rows_of(t.X[l], y.given), G.at[l], y.stride, t.A, y.stride);
    for (long s = 0; s < t.C; s++) {
      const long row = s * y.stride;
      d_r[s] -= row_dot(t.A + row, t.delta[l] + row, y.out);
      for (long i = row; i < row + y.stride; i += VL)
        store(d.delta[l] + i, load(d.delta[l] + i) - r[s] * load(t.A + i));
    }
    if (!d.X[l]) continue;
    scale_rows(t.C, y.stride, t.delta[l], r, -1, t.A);
    add_product(t.C, y.given, y.out, rows_of(t.A, y.stride), d.GT.at[l], y.given, d.X[l], y.given);
  }
}

inline void token_write_bwd(const Task& k, Tile& t, Gradients& d, Memory W, Memory S, Memory I) {
  const long last = t.C - 1;
  const float beta = t.beta[last], f = t.f[last], eps = t.eps[last];
  d.beta[last] += dot(k.shape, d.W, W) - (I ? dot(k.shape, d.W, I) : 0);
  d.f[last] += dot(k.shape, d.W, S);
  d.eps += dot(k.shape, d.S, S);
  descend_bwd(k, t, d, t.of_w, d.W, d.of_w);
  descend_bwd(k, t, d, t.of_s, d.S, d.of_s);
  each_vector(k.shape, [&](int l, long i) {
    const vec w = load(d.W.at[l] + i), s = load(d.S.at[l] + i);
    if (I) store(d.I.at[l] + i, load(d.I.at[l] + i) + (1 - beta) * w);
    store(d.W.at[l] + i, beta * w);
    store(d.S.at[l] + i, f * w + eps * s);
  });
}

inline void chunk_write_bwd(const Task& k, Tile& t, Gradients& d, Place at, Memory W, Memory S,
                            Memory I, float* d_momentum, float* d_decay) {
  const long gate = k.gate(at.chunk);
  const float alpha = k.c.decay ? k.c.decay[gate] : 0, eta = k.c.momentum ? k.c.momentum[gate] : 0;
  if (at.closes) {
    if (d_decay) d_decay[gate] = (I ? dot(k.shape, d.W, I) : 0) - dot(k.shape, d.W, W);
    each_vector(k.shape, [&](int l, long i) {
      const vec w = load(d.W.at[l] + i);
      store(d.S.at[l] + i, load(d.S.at[l] + i) + w);
      if (I) store(d.I.at[l] + i, load(d.I.at[l] + i) + alpha * w);
      store(d.W.at[l] + i, (1 - alpha) * w);
    });
  }
  descend_bwd(k, t, d, t.rate, d.S, d.rate);
  if (at.opens) {
    if (d_momentum) d_momentum[gate] = dot(k.shape, d.S, S);
    each_vector(k.shape, [&](int l, long i) { store(d.S.at[l] + i, eta * load(d.S.at[l] + i)); });
  }
}

}  // namespace mal
