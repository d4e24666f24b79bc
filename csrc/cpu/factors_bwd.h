// The gradients of a tile's coefficients, rates and factors (see tile.h), the last of its backward.
//
// Coefficients, with λ_t, μ_t the gradients of rows w_t, E_t, 0 at s > t, from the last row on:
//   λ_t = a_{t+1} λ_{t+1} + d(w rate)_t rate
//   μ_t = η_{t+1} μ_{t+1} + λ_t, and in the last row + d(E_C rate) rate
//   da_t = <λ_t, w_{t-1}> + β̄_t β_{t-1} + f̄_t f_{t-1},  dη_t = <μ_t, E_{t-1}> + ε̄_t ε_{t-1}
//   β̄_t = dβ_t + a_{t+1} β̄_{t+1},  f̄_t = df_t + a_{t+1} f̄_{t+1}
//   ε̄_t = dε_t + f̄_t + η_{t+1} ε̄_{t+1}
// Nothing is divided by: η = 0 and α = 1 are exact.
//
// Rates: dθ = c drate with c = rate / θ; where c < 1, κ = -drate θ c / ‖g‖² gives
//   dδ_l += κ ‖x_l‖² δ_l,  dX_l += κ ‖δ_l‖² x_l.
//
// Factors: du = dδ_1 ⊙ φ',  dδ_2 += du A_2,  dA_2 += duᵀ δ_2 + Xᵀ dz,  dX += dz A_2ᵀ,
//   dz_1 = dX ⊙ φ' + dδ_1 ⊙ u ⊙ φ'',  dK += dz_1 A_1ᵀ,  dA_1 += Kᵀ dz_1
// with dz = 2 dδ_2 + 2 e dsurprise = -dV, or through the norm as written at errors_bwd.
#pragma once
#include "gradients.h"

namespace mal {

inline void coefficients_bwd(const Task& k, Tile& t, Gradients& d, Place at, float* d_momentum,
                             float* d_decay) {
  const long last = t.C - 1;
  float lambda[TILE] = {}, mu[TILE] = {}, beta = 0, f = 0, eps = d.eps;
  for (long s = 0; s < t.C; s++) {
    d.w[last * TILE + s] += d.of_w[s];
    d.rate[s] += d.of_s[s] * t.E[last * TILE + s];
    mu[s] = d.of_s[s] * t.rate[s];
  }
  for (long i = last; i >= 0; i--) {
    vec of_a{}, of_eta{};
    beta += d.beta[i], f += d.f[i], eps += f;
    for (long s = 0; s <= i; s += VL) {
      const vec dw = load(d.w + i * TILE + s);
      store(d.rate + s, load(d.rate + s) + dw * load(t.w + i * TILE + s));
      const vec l = load(lambda + s) + dw * load(t.rate + s), m = load(mu + s) + l;
      if (i) {
        of_a += l * load(t.w + (i - 1) * TILE + s);
        of_eta += m * load(t.E + (i - 1) * TILE + s);
      }
      store(lambda + s, l * t.a[i]);
      store(mu + s, m * t.eta[i]);
    }
    const float before = i ? t.f[i - 1] : 0;
    const long n = k.token(at.t + i);
    if (d_decay) d_decay[n] = -(sum(of_a) + beta * (i ? t.beta[i - 1] : 1) + f * before);
    if (d_momentum) d_momentum[n] = sum(of_eta) + eps * (i ? t.eps[i - 1] : 1);
    beta *= t.a[i], f *= t.a[i], eps *= t.eta[i];
  }
}

inline void rates_bwd(const Task& k, Tile& t, Gradients& d, Place at, float* d_lr) {
  for (long s = 0; s < t.C; s++) {
    const long n = k.token(at.t + s);
    d_lr[n] = d.rate[s] * t.clip[s];
    if (t.clip[s] >= 1) continue;
    const float kappa = -d.rate[s] * k.c.lr[n] * t.clip[s] / t.square[s];
    for (int l = k.shape.begin; l < k.shape.end; l++) {
      const Layer& y = k.shape.layer[l];
      const float *x = t.X[l] + s * y.given, *delta = t.delta[l] + s * y.stride;
      const float of_delta = kappa * row_dot(x, x, y.in);
      const float of_x = kappa * row_dot(delta, delta, y.out);
      for (long i = 0; i < y.stride; i += VL) {
        float* to = d.delta[l] + s * y.stride + i;
        store(to, load(to) + of_delta * load(delta + i));
      }
      for (long i = 0; d.X[l] && i < y.given; i += VL) {
        float* to = d.X[l] + s * y.given + i;
        store(to, load(to) + of_x * load(x + i));
      }
    }
  }
}

// From dδ of the last layer (and of γ) to dz in d.z, and -dV in d.y. With the norm, of one token,
//   d̄ = r (dδ - mean dδ - n mean(dδ ⊙ n)),  ē = 2 g ⊙ d̄ + 2 n ⊙ dδ_γ + 2 e dsurprise = -dV
//   dK += ē,  dγ = 2 e ⊙ d̄ + n ⊙ ē
//   dn = g ⊙ ē + 2 e ⊙ dδ_γ - 2 r (mean(e ⊙ g ⊙ n) dδ + mean(dδ ⊙ n) e ⊙ g)
//   dz = r (dn - mean dn - n (mean(dn ⊙ n) + mean(dδ ⊙ δ)))
inline void errors_bwd(const Task& k, Tile& t, Gradients& d, Place at, Memory anchor,
                       const float* d_surprise) {
  const long D = k.shape.D, stride = padded(D);
  float* bar = t.A;
  if (k.shape.gain) normalise_bwd(t.C, D, t.normed, t.deviation, d.delta[LAST], nullptr, bar);
  for (long s = 0; s < t.C; s++) {
    const float surprise = 2 * d_surprise[k.token(at.t + s)];
    const float *e = t.z + s * stride, *n = t.normed + s * stride;
    const float *delta = d.delta[LAST] + s * stride, *d_gain = d.delta[GAIN] + s * stride;
    float *y = d.y + s * stride, *z = d.z + s * stride, *dK = d.K + s * stride;
    if (!k.shape.gain) {
      for (long i = 0; i < stride; i += VL) {
        const vec of_e = 2.f * load(delta + i) + surprise * load(e + i);
        store(y + i, -of_e);
        store(z + i, of_e);
      }
      continue;
    }
    vec projected{};
    for (long i = 0; i < D; i += VL) {
      const vec g = 1.f + load(anchor.at[GAIN] + i);
      projected += first_lanes(D - i, load(e + i) * g * load(n + i));
    }
    const float along = row_dot(delta, n, D) / D, r = t.deviation[s];
    const float mean = sum(projected) / D;
    d.more[s] = row_dot(delta, t.delta[LAST] + s * stride, D) / D;
    for (long i = 0; i < stride; i += VL) {
      const vec g = 1.f + load(anchor.at[GAIN] + i), of_d = load(bar + s * stride + i);
      const vec E = load(e + i), N = load(n + i), of_gain = load(d_gain + i);
      const vec of_e = 2.f * g * of_d + 2.f * N * of_gain + surprise * E;
      store(y + i, -of_e);
      store(dK + i, load(dK + i) + of_e);
      store(d.A.at[GAIN] + i, load(d.A.at[GAIN] + i) + 2.f * E * of_d + N * of_e);
      const vec through_means = mean * load(delta + i) + along * E * g;
      store(z + i, g * of_e + 2.f * (E * of_gain - r * through_means));
    }
  }
  if (k.shape.gain) normalise_bwd(t.C, D, t.normed, t.deviation, d.z, d.more, d.z);
}

inline void factors_bwd(const Task& k, Tile& t, Gradients& d, Place at, Memory anchor,
                        const float* d_surprise, void* d_k, void* d_v) {
  const Shape& z = k.shape;
  const Layer &first = z.layer[FIRST], &last = z.layer[LAST];
  const long C = t.C;
  if (z.hidden) {
    float* du = d.delta[FIRST];
    for (long i = 0; i < C * first.stride; i += VL) {
      const vec of_delta = load(d.delta[FIRST] + i);
      store(d.z1 + i, of_delta * load(t.u + i) * load(t.h2 + i));
      store(du + i, of_delta * load(t.h1 + i));
    }
    add_product(C, last.stride, z.E, rows_of(du, first.stride), anchor.at[LAST], last.stride,
                d.delta[LAST], last.stride);
    add_product(z.E, last.stride, C, columns_of(du, first.stride), t.delta[LAST], last.stride,
                d.A.at[LAST], last.stride);
  }
  errors_bwd(k, t, d, at, anchor, d_surprise);
  k.unpack_tokens(d.y, at, d_v);
  add_product(C, last.given, z.D, rows_of(d.z, last.stride), d.AT.at[LAST], last.given, d.X[LAST],
              last.given);
  add_product(z.E, last.stride, C, columns_of(t.X[LAST], last.given), d.z, last.stride,
              d.A.at[LAST], last.stride);
  if (z.hidden) {
    for (long i = 0; i < C * first.stride; i += VL)
      store(d.z1 + i, load(d.z1 + i) + load(d.h + i) * load(t.h1 + i));
    add_product(C, first.given, z.E, rows_of(d.z1, first.stride), d.AT.at[FIRST], first.given, d.K,
                first.given);
    add_product(z.D, first.stride, C, columns_of(t.K, first.given), d.z1, first.stride,
                d.A.at[FIRST], first.stride);
  }
  k.unpack_tokens(d.K, at, d_k);
}

}  // namespace mal
