// The gradients of one row and head while it is walked from its last tile to its first.
#pragma once
#include "tile.h"

namespace mal {

// Of FIRST and LAST the transposes: [out, in] in rows of padded(in).
inline Memory take_transposed(Arena& arena, const Shape& z) {
  Memory m;
  for (int l = z.begin; l < GAIN; l++) m.at[l] = arena.take(z.layer[l].stride, z.layer[l].rows);
  return m;
}
inline void transpose_memory(const Shape& z, Memory from, Memory to) {
  for (int l = z.begin; l < GAIN; l++) {
    const Layer& y = z.layer[l];
    transpose(y.rows, y.stride, from.at[l], y.stride, to.at[l], y.rows);
  }
}

// d of a name is the gradient of what has this name in tile.h.
struct Gradients {
  Memory W, S, A, I;           // of the state after the tile at hand, then before it
  Memory WT, ST, IT, AT, GT;   // transposed: W, S, I, A themselves; a gradient
  float *X[LAYERS], *x[LAYERS], *delta[LAYERS];  // [C, in] or null, [C, out]
  float *K, *Q, *h, *hq;                         // what X and x point at
  float *y, *z, *gain, *z1;                      // [C, D], but z1 [C, E]
  float *w, *scores;                             // [C, C] of w rate and of x Xᵀ
  float *deltaT;                                 // δ transposed
  float *beta, *f, *rate, *of_w, *of_s, *more;   // [C]
  float eps = 0;

  Gradients(const Task& k, Arena& m, Memory of_weights, Memory of_trace)
      : W(of_weights), S(of_trace), A(take_memory(m, k.shape)), I(take_memory(m, k.shape)),
        WT(take_transposed(m, k.shape)), ST(take_transposed(m, k.shape)),
        IT(take_transposed(m, k.shape)), AT(take_transposed(m, k.shape)),
        GT(take_transposed(m, k.shape)) {
    const Shape& s = k.shape;
    const long features = padded(s.D), units = padded(s.E);
    for (float** p : {&K, &Q, &y, &z, &gain}) *p = m.take(TILE, features);
    for (float** p : {&w, &scores}) *p = m.take(TILE, TILE);
    for (float** p : {&beta, &f, &rate, &of_w, &of_s, &more}) *p = m.take(1, TILE);
    deltaT = m.take(std::max(features, units), TILE);
    X[LAST] = K, x[LAST] = Q, X[GAIN] = x[GAIN] = nullptr;
    if (s.hidden) {
      for (float** p : {&h, &hq, &z1}) *p = m.take(TILE, units);
      X[FIRST] = K, x[FIRST] = Q, X[LAST] = h, x[LAST] = hq;
    }
    for (int l = s.begin; l < s.end; l++) delta[l] = m.take(TILE, s.layer[l].stride);
  }

  // Zero for a new tile of C tokens, but for those of the state.
  void begin_tile(const Shape& s, long C) {
    memset(w, 0, 4 * TILE * TILE);
    for (float* p : {beta, f, rate, of_w, of_s}) memset(p, 0, 4 * TILE);
    memset(K, 0, 4 * C * padded(s.D));
    if (s.hidden) memset(h, 0, 4 * C * padded(s.E));
    for (int l = s.begin; l < s.end; l++) memset(delta[l], 0, 4 * C * s.layer[l].stride);
    eps = 0;
  }
};

}  // namespace mal
