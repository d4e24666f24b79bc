// A tile of at most 64 tokens of one row and head: what forward and backward both compute of it.
//
// The mathematics is that of mal_kernels/reference.py, with W, S, A the weights, the momentum and
// the anchor before the tile, I the weights that decay pulls toward, X_l what layer l is given by
// the keys and δ_l what its gradient X_lᵀ δ_l has besides:
//
//   X = K, z = K A_1, X = φ(z), e = X A_2 - V, δ_2 = 2 e, δ_1 = (δ_2 A_2ᵀ) ⊙ φ'(z), surprise ‖e‖²
//   with norm  e = K + g ⊙ n - V, n = LayerNorm(X A_2), g = 1 + γ, δ_γ = 2 e ⊙ n,
//              δ_2 = r (d - mean d - n mean(d ⊙ n)) with d = 2 e ⊙ g and r the inverse deviation
//   rate_s = θ_s min(1, max / ‖g_s‖), ‖g_s‖² = Σ_l ‖x_ls‖² ‖δ_ls‖²
//   E_t = η_t E_{t-1}, w_t = a_t w_{t-1} + E_t, both 1 at s = t;   a = 1 - α
//   β_t = a_t β_{t-1},   ε_t = η_t ε_{t-1},   f_t = a_t f_{t-1} + ε_t
//   read   z_t = β_t x_t W + f_t x_t S + (1 - β_t) x_t I - Σ_{s<=t} w_ts rate_s (x_t·X_s) δ_s
//   write  W' = β_C W + f_C S + (1 - β_C) I - Σ_s w_Cs rate_s X_sᵀ δ_s
//          S' = ε_C S - Σ_s E_Cs rate_s X_sᵀ δ_s
//
// Chunk steps read z = x W, and add -Σ_s rate_s X_sᵀ δ_s to S alone until the chunk closes.
#pragma once
#include <math.h>

#include "activation.h"
#include "memory.h"
#include "tokens.h"

namespace mal {

constexpr long TILE = 64;
constexpr float LAYER_NORM_EPS = 1e-5f;

// Where a tile stands in its row.
struct Place {
  long t, C;           // its first token and how many it has
  long chunk;          // of the row
  bool opens, closes;  // the chunk: its first tile, its last one in this call
};

inline std::vector<Place> places_of(long tokens, long chunk_size, long position) {
  std::vector<Place> found;
  for (long t = 0, chunk = 0, at = position; t < tokens; chunk++, at = 0) {
    const long end = t + std::min(chunk_size - at, tokens - t);
    for (; t < end; t += found.back().C) {
      const long C = std::min(TILE, end - t);
      const bool first = found.empty() || found.back().chunk != chunk;
      found.push_back({t, C, chunk, first && at == 0, t + C == end});
    }
  }
  return found;
}

// A row and head of a call.
struct Task {
  const mal_memory_call& c;
  const Shape& shape;
  long g, row, head, begin, tokens, position;

  Task(const mal_memory_call& call, const Shape& z, long task)
      : c(call), shape(z), g(task), row(task / call.H), head(task % call.H) {
    begin = c.cu_seqlens ? c.cu_seqlens[row] : row * c.T;
    tokens = c.cu_seqlens ? c.cu_seqlens[row + 1] - begin : c.T;
    position = c.position ? c.position[row] : 0;
  }
  std::vector<Place> places() const { return places_of(tokens, c.chunk_size, position); }
  // Where its token t stands among [B, T, H], and the gate of a chunk among [B, chunk gates, H].
  long token(long t) const { return (begin + t) * c.H + head; }
  long gate(long chunk) const {
    return ((c.cu_seqlens ? c.first_gate[row] : row * c.chunk_gates) + chunk) * c.H + head;
  }
  void pack_tokens(const void* from, Place at, float* to) const {
    const long D = shape.D;
    pack(c.dtype, from, token(at.t) * D, c.H * D, at.C, D, to, padded(D));
  }
  void unpack_tokens(const float* from, Place at, void* to) const {
    const long D = shape.D;
    unpack(c.dtype, from, padded(D), at.C, D, to, token(at.t) * D, c.H * D);
  }
};

struct Tile {
  long C = 0;
  float *K, *Q, *V, *ones;                        // [C, D], [C, 1]
  float *X[LAYERS], *x[LAYERS], *delta[LAYERS];   // [C, in] of keys and queries, [C, out]
  float *XT[LAYERS], *P[LAYERS];                  // [in, C] and x Xᵀ [C, C]
  float *h, *h1, *h2, *u;                         // [C, E] φ(K A_1), φ', φ''; δ_2 A_2ᵀ
  float *hq, *hq1;                                // [C, E] the same of the read
  float *z;                                       // [C, D] the last layer's result, then e
  float *normed, *deviation;                      // n [C, D] and r [C]
  float *zq, *gain, *normed_q, *deviation_q;      // of the read; gain is 1 + γ of each token
  float *w, *E;                                   // [C, C] without rates
  float *beta, *f, *eps, *pull, *a, *eta;         // [C]; pull is 1 - β
  float *square, *clip, *rate, *of_w, *of_s;      // [C] ‖g‖², how much it is clipped; rates of the
                                                  // last row of w and of E
  float *N, *A;                                   // scratch [C, C], [C, the widest]

  Tile(Arena& m, const Shape& s) {
    const long features = padded(s.D), units = padded(s.E);
    for (float** p : {&K, &Q, &V, &z, &zq}) *p = m.take(TILE, features);
    for (float** p : {&w, &E, &N}) *p = m.take(TILE, TILE);
    for (float** p : {&beta, &f, &eps, &pull, &a, &eta, &square, &clip, &rate, &of_w, &of_s})
      *p = m.take(1, TILE);
    A = m.take(TILE, std::max(features, units));
    X[LAST] = K, x[LAST] = Q;
    if (s.hidden) {
      for (float** p : {&h, &h1, &h2, &u, &hq, &hq1}) *p = m.take(TILE, units);
      X[FIRST] = K, x[FIRST] = Q, X[LAST] = h, x[LAST] = hq;
    }
    if (s.gain) {
      for (float** p : {&normed, &gain, &normed_q}) *p = m.take(TILE, features);
      for (float** p : {&deviation, &deviation_q}) *p = m.take(1, TILE);
      X[GAIN] = x[GAIN] = ones = m.take(TILE, VL);
      for (long t = 0; t < TILE; t++) ones[t * VL] = 1;
    }
    for (int l = s.begin; l < s.end; l++) {
      delta[l] = m.take(TILE, s.layer[l].stride);
      XT[l] = m.take(s.layer[l].given, TILE);
      P[l] = m.take(TILE, TILE);
    }
  }
};

// --- layer norm -------------------------------------------------------------------------------

// n = (z - mean) r and r of every row of D numbers
inline void normalise(long C, long D, const float* z, float* n, float* r) {
  const long stride = padded(D);
  for (long t = 0; t < C; t++, z += stride, n += stride) {
    const float mean = row_sum(z, D) / D;
    for (long i = 0; i < D; i += VL) store(n + i, load(z + i) - mean);
    r[t] = 1 / sqrtf(row_dot(n, n, D) / D + LAYER_NORM_EPS);
    for (long i = 0; i < D; i += VL) store(n + i, load(n + i) * r[t]);
  }
}

// r (d - mean d - n (mean(d ⊙ n) + more)): the gradient of z, given d of n; in place if wished
inline void normalise_bwd(long C, long D, const float* n, const float* r, const float* d,
                          const float* more, float* to) {
  const long stride = padded(D);
  for (long t = 0; t < C; t++, n += stride, d += stride, to += stride) {
    const float mean = row_sum(d, D) / D, along = row_dot(d, n, D) / D + (more ? more[t] : 0);
    for (long i = 0; i < D; i += VL)
      store(to + i, r[t] * (load(d + i) - mean - along * load(n + i)));
  }
}

// --- the gradient's factors -------------------------------------------------------------------

// e of the tile into t.z, and δ of the layers from the last one on, γ's included.
inline void errors(const Task& k, Tile& t, Memory anchor) {
  const long D = k.shape.D, stride = padded(D), count = t.C * stride;
  if (!k.shape.gain) {
    for (long i = 0; i < count; i += VL) {
      const vec e = load(t.z + i) - load(t.V + i);
      store(t.z + i, e);
      store(t.delta[LAST] + i, 2.f * e);
    }
    return;
  }
  normalise(t.C, D, t.z, t.normed, t.deviation);
  for (long s = 0; s < t.C; s++)
    for (long d = 0; d < stride; d += VL) {
      const long i = s * stride + d;
      const vec n = load(t.normed + i), g = 1.f + load(anchor.at[GAIN] + d);
      const vec e = load(t.K + i) + g * n - load(t.V + i);
      store(t.z + i, e);
      store(t.delta[GAIN] + i, 2.f * e * n);
      store(t.delta[LAST] + i, 2.f * e * g);
    }
  normalise_bwd(t.C, D, t.normed, t.deviation, t.delta[LAST], nullptr, t.delta[LAST]);
}

inline void rates(const Task& k, Tile& t, Place at) {
  const float most = float(k.c.max_grad_norm);
  for (long s = 0; s < padded(t.C); s++) t.rate[s] = 0, t.clip[s] = 1;
  for (long s = 0; s < t.C; s++) {
    if (most > 0) {
      t.square[s] = 0;
      for (int l = k.shape.begin; l < k.shape.end; l++) {
        const Layer& y = k.shape.layer[l];
        const float *x = t.X[l] + s * y.given, *d = t.delta[l] + s * y.stride;
        t.square[s] += row_dot(x, x, y.in) * row_dot(d, d, y.out);
      }
      const float scale = most / sqrtf(t.square[s]);
      t.clip[s] = scale >= 1 ? 1 : scale;  // NaN stays
    }
    t.rate[s] = k.c.lr[k.token(at.t + s)] * t.clip[s];
  }
}

// X, δ and the rates at the anchor; last_T is its last layer transposed, [D, E] (depth 2 alone).
inline void factors(const Task& k, Tile& t, Place at, Memory anchor, const float* last_T,
                    float* surprise) {
  const Shape& z = k.shape;
  const Layer &first = z.layer[FIRST], &last = z.layer[LAST];
  const long C = t.C = at.C;
  k.pack_tokens(k.c.k, at, t.K);
  k.pack_tokens(k.c.v, at, t.V);
  if (z.hidden) {
    product(C, first.stride, z.D, rows_of(t.K, first.given), anchor.at[FIRST], first.stride, t.h2,
            first.stride);
    activate(k.c.activation, C * first.stride, t.h2, t.h, t.h1, t.h2);
  }
  product(C, last.stride, z.E, rows_of(t.X[LAST], last.given), anchor.at[LAST], last.stride, t.z,
          last.stride);
  errors(k, t, anchor);
  if (surprise)
    for (long s = 0; s < C; s++) {
      const float* e = t.z + s * last.stride;
      surprise[k.token(at.t + s)] = row_dot(e, e, z.D);
    }
  if (z.hidden) {
    product(C, first.stride, z.D, rows_of(t.delta[LAST], last.stride), last_T, first.stride, t.u,
            first.stride);
    for (long i = 0; i < C * first.stride; i += VL)
      store(t.delta[FIRST] + i, load(t.u + i) * load(t.h1 + i));
  }
  rates(k, t, at);
}

// --- token steps ------------------------------------------------------------------------------

// w, E, β, f, ε row by row, and the rates of the last row.
inline void coefficients(const Task& k, Tile& t, Place at) {
  const mal_memory_call& c = k.c;
  const long wide = padded(t.C);
  float w[TILE] = {}, E[TILE] = {}, beta = 1, f = 0, eps = 1;
  for (long i = 0; i < t.C; i++) {
    const long n = k.token(at.t + i);
    const float a = t.a[i] = 1 - (c.decay ? c.decay[n] : 0);
    const float eta = t.eta[i] = c.momentum ? c.momentum[n] : 0;
    eps *= eta, beta *= a, f = a * f + eps;
    t.eps[i] = eps, t.beta[i] = beta, t.f[i] = f, t.pull[i] = 1 - beta;
    for (long s = 0; s <= i; s += VL) {
      const vec e = load(E + s) * eta;
      store(E + s, e);
      store(w + s, load(w + s) * a + e);
    }
    E[i] = 1, w[i] = 1;
    memcpy(t.w + i * TILE, w, 4 * wide);
    memcpy(t.E + i * TILE, E, 4 * wide);
  }
  for (long s = 0; s < wide; s += VL) {
    store(t.of_w + s, load(w + s) * load(t.rate + s));
    store(t.of_s + s, load(E + s) * load(t.rate + s));
  }
}

// N = -(w rate) ⊙ M on and below the diagonal, 0 above, whatever M holds there.
inline void weigh(const Tile& t, const float* M, float* N) {
  for (long i = 0; i < t.C; i++)
    for (long s = 0; s < padded(t.C); s += VL) {
      const vec scale = load(t.w + i * TILE + s) * load(t.rate + s);
      store(N + i * TILE + s, first_lanes(i + 1 - s, -scale * load(M + i * TILE + s)));
    }
}

// P = x Xᵀ of a layer, on and below the diagonal.
inline void scores(const Task& k, Tile& t, int l) {
  const Layer& y = k.shape.layer[l];
  transpose(padded(t.C), y.given, t.X[l], y.given, t.XT[l], TILE);
  product(t.C, padded(t.C), y.in, rows_of(t.x[l], y.given), t.XT[l], TILE, t.P[l], TILE, C_LOWER);
}

// z [C, out] of a layer: every token at its own weights.
inline void read_layer(const Task& k, Tile& t, int l, Memory W, Memory S, Memory I, float* z) {
  const Layer& y = k.shape.layer[l];
  const long C = t.C;
  if (!k.c.token_steps)
    return product(C, y.stride, y.in, rows_of(t.x[l], y.given), W.at[l], y.stride, z, y.stride);
  scale_rows(C, y.given, t.x[l], t.beta, 1, t.A);
  product(C, y.stride, y.in, rows_of(t.A, y.given), W.at[l], y.stride, z, y.stride);
  scale_rows(C, y.given, t.x[l], t.f, 1, t.A);
  add_product(C, y.stride, y.in, rows_of(t.A, y.given), S.at[l], y.stride, z, y.stride);
  if (I) {
    scale_rows(C, y.given, t.x[l], t.pull, 1, t.A);
    add_product(C, y.stride, y.in, rows_of(t.A, y.given), I.at[l], y.stride, z, y.stride);
  }
  scores(k, t, l);
  weigh(t, t.P[l], t.N);
  add_product(C, y.stride, C, rows_of(t.N, TILE), t.delta[l], y.stride, z, y.stride, A_LOWER);
}

// The result of the last layer into t.zq, with the gain the output; what it takes on the way stays.
inline void read(const Task& k, Tile& t, Place at, Memory W, Memory S, Memory I, bool for_bwd) {
  const Shape& z = k.shape;
  const long count = t.C * padded(z.D);
  k.pack_tokens(k.c.q, at, t.Q);
  if (z.hidden) {
    read_layer(k, t, FIRST, W, S, I, t.hq);
    activate(k.c.activation, t.C * padded(z.E), t.hq, t.hq, for_bwd ? t.hq1 : nullptr, nullptr);
  }
  if (for_bwd && !z.gain) {  // the gradients need no output
    if (k.c.token_steps) scores(k, t, LAST);
    return;
  }
  read_layer(k, t, LAST, W, S, I, t.zq);
  if (!z.gain) return;
  read_layer(k, t, GAIN, W, S, I, t.gain);
  normalise(t.C, z.D, t.zq, t.normed_q, t.deviation_q);
  for (long i = 0; i < count; i += VL) {
    const vec g = 1.f + load(t.gain + i);
    store(t.gain + i, g);
    store(t.zq + i, load(t.Q + i) + g * load(t.normed_q + i));
  }
}

// --- the write --------------------------------------------------------------------------------

// to -= Σ_s rate_s X_sᵀ δ_s
inline void descend(const Task& k, Tile& t, const float* rate, Memory to) {
  for (int l = k.shape.begin; l < k.shape.end; l++) {
    const Layer& y = k.shape.layer[l];
    scale_rows(t.C, y.given, t.X[l], rate, -1, t.A);
    add_product(y.in, y.stride, t.C, columns_of(t.A, y.given), t.delta[l], y.stride, to.at[l],
                y.stride);
  }
}

// The state after the tile in W and S, which lie in `to` from then on: at first they may be the
// caller's, who gave them to be read.
struct State {
  Memory W, S;
};

inline void write(const Task& k, Tile& t, Place at, State& now, State to, Memory I) {
  const Shape& z = k.shape;
  const Memory W = now.W, S = now.S;
  if (k.c.token_steps) {
    const float beta = t.beta[t.C - 1], f = t.f[t.C - 1], eps = t.eps[t.C - 1];
    each_vector(z, [&](int l, long i) {
      const vec s = load(S.at[l] + i);
      vec w = beta * load(W.at[l] + i) + f * s;
      if (I) w += (1 - beta) * load(I.at[l] + i);
      store(to.W.at[l] + i, w);
      store(to.S.at[l] + i, eps * s);
    });
    now = to;
    descend(k, t, t.of_w, to.W);
    descend(k, t, t.of_s, to.S);
    return;
  }
  const float eta = k.c.momentum ? k.c.momentum[k.gate(at.chunk)] : 0;
  const float alpha = k.c.decay ? k.c.decay[k.gate(at.chunk)] : 0;
  if (at.opens)
    each_vector(z, [&](int l, long i) { store(to.S.at[l] + i, eta * load(S.at[l] + i)); });
  now.S = to.S;  // a chunk opens with the first tile
  descend(k, t, t.rate, to.S);
  if (!at.closes) return;
  each_vector(z, [&](int l, long i) {
    const vec w = (1 - alpha) * load(W.at[l] + i) + load(to.S.at[l] + i);
    store(to.W.at[l] + i, I ? w + alpha * load(I.at[l] + i) : w);
  });
  now.W = to.W;
}

}  // namespace mal
