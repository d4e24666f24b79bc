// The gradients of a tile's read (see tile.h), given dz of a layer's result, from the last on:
//
//   L = dz Wᵀ, M = dz Sᵀ, N = dz Iᵀ,  Γ = dz δᵀ and P = x Xᵀ on and below the diagonal
//   dx = β L + f M + (1 - β) N - (w rate ⊙ Γ) X,  dX -= (w rate ⊙ Γ)ᵀ x,  dδ -= (w rate ⊙ P)ᵀ dz
//   d(w rate) -= P ⊙ Γ,  dβ += rowsum(x ⊙ (L - N)),  df += rowsum(x ⊙ M)
//   dW += (β x)ᵀ dz,  dS += (f x)ᵀ dz,  dI += ((1 - β) x)ᵀ dz
//
// With chunk steps dx = L and dW += xᵀ dz.
#pragma once
#include "gradients.h"

namespace mal {

// to = dz Gᵀ of a layer
inline void times_transposed(const Layer& y, long C, const float* dz, const float* GT, float* to) {
  product(C, y.given, y.out, rows_of(dz, y.stride), GT, y.given, to, y.given);
}

// dx without the part of Γ, and dβ, df.
inline void input_bwd(const Task& k, Tile& t, Gradients& d, int l, bool pulls, const float* dz) {
  const Layer& y = k.shape.layer[l];
  float *dx = d.x[l], *M = t.A;
  times_transposed(y, t.C, dz, d.WT.at[l], dx);
  times_transposed(y, t.C, dz, d.ST.at[l], M);
  for (long s = 0; s < t.C; s++) {
    const long row = s * y.given;
    d.beta[s] += row_dot(t.x[l] + row, dx + row, y.in);
    d.f[s] += row_dot(t.x[l] + row, M + row, y.in);
    for (long i = row; i < row + y.given; i += VL)
      store(dx + i, t.beta[s] * load(dx + i) + t.f[s] * load(M + i));
  }
  if (!pulls) return;
  float* N = t.A;
  times_transposed(y, t.C, dz, d.IT.at[l], N);
  for (long s = 0; s < t.C; s++) {
    const long row = s * y.given;
    d.beta[s] -= row_dot(t.x[l] + row, N + row, y.in);
    for (long i = row; i < row + y.given; i += VL)
      store(dx + i, load(dx + i) + t.pull[s] * load(N + i));
  }
}

// dβ and df of the gain, whose x is 1.
inline void gain_bwd(const Task& k, Tile& t, Gradients& d, Memory W, Memory S, Memory I,
                     const float* dz) {
  const Layer& y = k.shape.layer[GAIN];
  for (long s = 0; s < t.C; s++, dz += y.stride) {
    d.beta[s] += row_dot(dz, W.at[GAIN], y.out) - (I ? row_dot(dz, I.at[GAIN], y.out) : 0);
    d.f[s] += row_dot(dz, S.at[GAIN], y.out);
  }
}

inline void read_layer_bwd(const Task& k, Tile& t, Gradients& d, int l, Memory W, Memory S,
                           Memory I, const float* dz) {
  const Layer& y = k.shape.layer[l];
  const long C = t.C;
  const auto add_outer = [&](const float* scale, Memory to) {
    scale_rows(C, y.given, t.x[l], scale, 1, t.A);
    add_product(y.in, y.stride, C, columns_of(t.A, y.given), dz, y.stride, to.at[l], y.stride);
  };
  if (!k.c.token_steps) {
    if (d.x[l]) times_transposed(y, C, dz, d.WT.at[l], d.x[l]);
    return add_product(y.in, y.stride, C, columns_of(t.x[l], y.given), dz, y.stride, d.W.at[l],
                       y.stride);
  }
  if (d.x[l]) input_bwd(k, t, d, l, bool(I), dz);
  else gain_bwd(k, t, d, W, S, I, dz);
  transpose(padded(C), y.stride, t.delta[l], y.stride, d.deltaT, TILE);
  product(C, padded(C), y.out, rows_of(dz, y.stride), d.deltaT, TILE, d.scores, TILE, C_LOWER);
  for (long i = 0; i < C; i++)
    for (long s = 0; s <= i; s += VL) {
      const long at = i * TILE + s;
      const vec both = load(t.P[l] + at) * load(d.scores + at);
      store(d.w + at, load(d.w + at) - first_lanes(i + 1 - s, both));
    }
  weigh(t, d.scores, t.N);
  if (d.x[l])
    add_product(C, y.given, C, rows_of(t.N, TILE), t.X[l], y.given, d.x[l], y.given, A_LOWER);
  if (d.X[l])
    add_product(C, y.given, C, columns_of(t.N, TILE), t.x[l], y.given, d.X[l], y.given, A_UPPER);
  weigh(t, t.P[l], t.N);
  add_product(C, y.stride, C, columns_of(t.N, TILE), dz, y.stride, d.delta[l], y.stride, A_UPPER);
  add_outer(t.beta, d.W);
  add_outer(t.f, d.S);
  if (I) add_outer(t.pull, d.I);
}

inline void read_bwd(const Task& k, Tile& t, Gradients& d, Place at, Memory W, Memory S, Memory I,
                     const void* d_output, void* d_q) {
  const Shape& z = k.shape;
  const long count = t.C * padded(z.D), units = t.C * padded(z.E);
  read(k, t, at, W, S, I, true);
  k.pack_tokens(d_output, at, d.y);
  transpose_memory(z, W, d.WT);
  if (k.c.token_steps) transpose_memory(z, S, d.ST);
  if (z.gain) {  // y = q + g ⊙ n
    for (long i = 0; i < count; i += VL) {
      store(d.gain + i, load(d.y + i) * load(t.normed_q + i));
      store(d.z + i, load(d.y + i) * load(t.gain + i));
    }
    normalise_bwd(t.C, z.D, t.normed_q, t.deviation_q, d.z, nullptr, d.z);
    read_layer_bwd(k, t, d, GAIN, W, S, I, d.gain);
  }
  read_layer_bwd(k, t, d, LAST, W, S, I, z.gain ? d.z : d.y);
  if (z.hidden) {
    for (long i = 0; i < units; i += VL) store(d.hq + i, load(d.hq + i) * load(t.hq1 + i));
    read_layer_bwd(k, t, d, FIRST, W, S, I, d.hq);
  }
  if (z.gain)
    for (long i = 0; i < count; i += VL) store(d.Q + i, load(d.Q + i) + load(d.y + i));
  k.unpack_tokens(d.Q, at, d_q);
}

}  // namespace mal
