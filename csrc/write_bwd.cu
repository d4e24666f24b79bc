// The gradients of neural_memory_fwd.cu, tile after tile from a row's last to its first.
//
// The cluster, its slices of the hidden units and the layouts are those of the forward. What stays
// in registers, in float32, are the gradients of W and S behind the tile (dW and dS, as w1, s1, w2,
// s2) and of the anchor (dA), which joins dW where its chunk begins. The forward has left W and S
// before every tile in global memory; h, δ and what else a tile needs are computed again from the
// anchor. With what a token writes, in each layer,
//
//     g = x ⊗ δ,  W' = β W + f S + (1 - β) W_init - Σ w ρ g,  S' = ε S - Σ E ρ g,  ρ = θ clip(‖g‖)
//
// a tile's gradients are, in this order:
//
//   the state   dβ = ⟨dW, W - W_init⟩, df = ⟨dW, S⟩, dε = ⟨dS, S⟩
//   factors     Gx = -(w x dW + E x dS), Gδ = -(w δ dWᵀ + E δ dSᵀ);  dδ = ρ Gx, dx = ρ Gδ
//   rate        d(wρ) = -x dW · δ, d(Eρ) = -x dS · δ;  dρ = w d(wρ) + E d(Eρ);  dθ = clip dρ
//   clip        q = -dρ ρ / ‖g‖² where it clips;  dδ += q ‖x‖² δ, dx += q ‖δ‖² x
//   first layer du = dδ1 ⊙ act'(z), dz = dδ1 ⊙ u ⊙ act''(z) + dh ⊙ act'(z)  with u = δ2 W2ᵀ
//   error       dδ2 += du W2, and through δ2 = 2 e (and LayerNorm) to do, of o = h W2, and to V, γ
//   network     dz += (do W2ᵀ) ⊙ act'(z);  dK = dx1 + dz W1ᵀ
//   anchor      dA1 += Kᵀ dz, dA2 += duᵀ δ2 + hᵀ do
//   state       dS ← ε dS + f dW, dW ← β dW;  dW_init += (1 - β) dW
//
// Where tokens have read, causal_read_bwd.cu has run before: what it has left of dδ, of dx (k or h),
// of dρ, of the gates and of the states is added to these.
//
// Sums over the hidden units are sums over the blocks: of o, of the scalars of a token, of dδ2 and
// of dK, four times a tile.
#include "write_bwd.h"
#include "block.cuh"

namespace mal::memory {
namespace {

enum Sum { kOnW, kOnS, kDelta1, kSums };  // x dW · δ, x dS · δ and ‖δ1‖², of each token

template <class T, int kD>
struct Shared {
  using Number = T;
  static constexpr int kFeatures = kD, kHidden = units_for(kD);
  Tile<T, kTokens, kD> k[1];
  Tile<T, kTokens, kD> v[1];
  Tile<T, kD, kHidden> w1;  // the anchor
  Tile<T, kHidden, kD> w2;
  Tile<T, kD, kHidden> dw1;  // behind the tile
  Tile<T, kD, kHidden> ds1;
  Tile<T, kHidden, kD> last[2];  // dW2 and dS2; then do
  Tile<T, kTokens, kHidden> h;
  Tile<T, kTokens, kHidden> d1;
  Tile<T, kTokens, kHidden> du;
  Tile<T, kTokens, kHidden> dz;
  Tile<T, kTokens, kD> d2;
  float slope[kTokens][kHidden + kPad];  // z, then act'(z); each number its thread's own
  float curve[kTokens][kHidden + kPad];  // act''(z), then u ⊙ act''(z), then dz so far; likewise
  // this block's part of h W2, then of dδ2; and o or its LayerNorm, then this block's part of dK
  float part[2][kTokens][kD + 4];
  float sums[kWarps * 16 / kTokens][kSums][kTokens];  // of the warps that share a token
  float hidden_norm[1][kTokens];                      // ‖h‖², of this block
  float dots[3], warp_dots[kWarps][3];                // dβ, df and dε, of this block
  float total_dots[3];
  float gain_sums[kWarps][kD];  // the anchor's dγ, of a warp's tokens
  float gain[4][kD];            // dγ of W and S, γ of the anchor, dγ of the anchor
  float lr[kTokens], momentum[kTokens], decay[kTokens];
  float on_w[kTokens], on_s[kTokens];  // w and E
  float f_before[kTokens], after[kTokens], of_kept[kTokens], of_momentum[kTokens];  // of gates()
  float rate[kTokens], d_on_w[kTokens], d_on_s[kTokens];
  float gain_on_w[kTokens], gain_on_s[kTokens];       // what γ gives to them
  float read_momentum[kTokens], read_decay[kTokens];  // what the read gives to the gates
  float rstd[kTokens], along[kTokens];                // of LayerNorm; ⟨d, normed⟩ / D σ
  float norm[kTokens], k_norm[kTokens], h_norm[kTokens], d2_norm[kTokens];  // squares
  float d1_norm[kTokens];
  float clip[kTokens];  // q
  alignas(16) float beta;  // as in block.cuh
  float f, epsilon, unused;
};

template <class T, int kD>
struct Backward : Tiles<Shared<T, kD>> {
  using Base = Tiles<Shared<T, kD>>;
  using typename Base::Slice, typename Base::Tokens, typename Base::Units;
  using Base::a, Base::s, Base::thread, Base::lane, Base::warp, Base::rank, Base::blocks;
  using Base::head, Base::row, Base::begin, Base::length, Base::chunk_size, Base::kHidden;
  using Base::kTile, Base::kWide, Base::kNarrow, Base::kOfW1, Base::kOfW2, Base::kShare, Base::wide;
  using Base::narrow, Base::first, Base::last, Base::w1, Base::s1, Base::w2, Base::s2;
  using Base::first_slice, Base::last_slice, Base::gain_at, Base::is_deep, Base::has_gain;
  using Base::load_layer, Base::store_layer, Base::load_state, Base::store_weights;
  using Base::store_trace, Base::store_gain, Base::set_layer, Base::set_anchor, Base::fetch;
  using Base::load_gates, Base::coefficients, Base::each_narrow, Base::each_wide, Base::hidden;
  using Base::project, Base::over_sharing, Base::over_blocks, Base::four_over_blocks;
  using Base::feature_of, Base::error_of, Base::sum_parts, Base::normalise, Base::clips;
  using Base::store_sums, Base::locate;

  const mal_write_bwd_args& to;
  float (&part)[kTokens][kD + 4] = s.part[0];
  float (&own)[kTokens][kD + 4] = s.part[1];  // each number its thread's own
  Tokens& d_output = in_place_of<Tokens>(s.last);
  float a1[kOfW1][4], a2[kOfW2][4];  // dA

  MAL_DEVICE explicit Backward(const mal_write_bwd_args& arguments)
      : Base(arguments.call), to(arguments) {}

  MAL_DEVICE bool wants_gates() const { return to.d_momentum || to.d_decay; }

  // --- states ----------------------------------------------------------------------------------

  MAL_DEVICE float gain_of(const float* from, int64_t slot) const {
    return from && thread < a.D ? from[gain_at(thread, slot)] : 0;
  }

  MAL_DEVICE void load_gradients() {
    load_state(to.d_new_weights, to.d_new_trace, row);
    load_layer(a1, first_slice(row), to.d_new_anchor.first);
    load_layer(a2, last_slice(row), to.d_new_anchor.last);
    if (thread < kD) s.gain[3][thread] = gain_of(to.d_new_anchor.gain, row);
  }

  MAL_DEVICE void store_gradients() const {
    store_weights(to.d_weights, row);
    store_trace(to.d_trace, row);
    if (!to.d_anchor.last) return;
    store_layer(a1, first_slice(row), to.d_anchor.first);
    store_layer(a2, last_slice(row), to.d_anchor.last);
    store_gain(s.gain[3], to.d_anchor, row);
  }

  // dW += dA, where the anchor is W.
  MAL_DEVICE void join_anchor() {
    join(w1, a1);
    join(w2, a2);
    if (thread >= kD) return;
    s.gain[0][thread] += s.gain[3][thread];
    s.gain[3][thread] = 0;
  }

  template <int kCount>
  MAL_DEVICE void join(float (&w)[kCount][4], float (&anchor)[kCount][4]) const {
#pragma unroll
    for (int n = 0; n < kCount; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) w[n][i] += anchor[n][i], anchor[n][i] = 0;
  }

  // What the products read of dW and dS.
  MAL_DEVICE void round_gradients() const {
    if (is_deep()) {
      set_layer(s.dw1, w1, first, first_slice(row), nullptr);
      set_layer(s.ds1, s1, first, first_slice(row), nullptr);
    }
    set_layer(s.last[0], w2, last, last_slice(row), nullptr);
    set_layer(s.last[1], s2, last, last_slice(row), nullptr);
  }

  // dβ, df and dε, of each warp, with the states of tile `slot`.
  MAL_DEVICE void dot_states(int64_t slot) const {
    float dots[3] = {};
    const int64_t layer = (row - slot) * a.H * a.D * a.E;
    if (is_deep())
      dot_layer(dots, w1, s1, first_slice(slot), to.tile_weights.first, to.tile_trace.first,
                a.init.first, layer);
    dot_layer(dots, w2, s2, last_slice(slot), to.tile_weights.last, to.tile_trace.last,
              a.init.last, layer);
    if (!rank && thread < kD) {
      float w = gain_of(to.tile_weights.gain, slot), trace = gain_of(to.tile_trace.gain, slot);
      dots[0] += s.gain[0][thread] * (w - gain_of(a.init.gain, row));
      dots[1] += s.gain[0][thread] * trace;
      dots[2] += s.gain[1][thread] * trace;
    }
#pragma unroll
    for (int i = 0; i < 3; i++) {
#pragma unroll
      for (int mask = 16; mask; mask /= 2) dots[i] += __shfl_xor_sync(~0u, dots[i], mask);
      if (lane == 0) s.warp_dots[warp][i] = dots[i];
    }
  }

  MAL_DEVICE void sum_dots() const {
    if (thread >= 3) return;
    s.dots[thread] = 0;
    for (int w = 0; w < kWarps; w++) s.dots[thread] += s.warp_dots[w][thread];
  }

  template <int kCount>
  MAL_DEVICE void dot_layer(float (&dots)[3], const float (&dw)[kCount][4],
                            const float (&ds)[kCount][4], const Slice& slice, const float* weights,
                            const float* trace, const float* init, int64_t init_at) const {
    slice.each(dw, [&](int n, int i, int64_t at) {
      if (at < 0) return;
      float target = init ? init[at + init_at] : 0;
      dots[0] += dw[n][i] * (weights[at] - target);
      dots[1] += dw[n][i] * trace[at];
      dots[2] += ds[n][i] * trace[at];
    });
  }

  // --- a tile's tokens -------------------------------------------------------------------------

  // h = act(K W1), act'(K W1) and act''(K W1)
  MAL_DEVICE void activations() {
    hidden(0, [&](int token, int unit, float z) {
      s.curve[token][unit] = curvature(a.activation, z);
    });
  }

  // Sums h W2 over the blocks, through LayerNorm; from it δ2, and what a token has of norms.
  MAL_DEVICE void error() {
    const int t = thread / kSharing;
    float* o = own[t];
    float total = sum_parts(o, 0), rstd = 1, of_d = 0, projected = 0;
    if (has_gain()) {
      rstd = normalise(o, over_sharing(total) / a.D);
#pragma unroll 4
      for (int i = 0; i < kShare; i++) {
        int feature = feature_of(i);
        float d = 2 * error_of(o[feature], feature, 0) * (1 + s.gain[2][feature]);
        of_d += d, projected += d * o[feature];
      }
      of_d = over_sharing(of_d) / a.D, projected = over_sharing(projected) / a.D;
    }
    float of_d2 = 0, of_k = 0, of_gain = 0, on_w = 0, on_s = 0;
#pragma unroll 4
    for (int i = 0; i < kShare; i++) {
      int feature = feature_of(i);
      float d = 2 * error_of(o[feature], feature, 0), k = to_float(s.k[0][t][feature]);
      if (has_gain()) {
        float of_gamma = d * o[feature];
        of_gain += of_gamma * of_gamma;
        on_w += s.gain[0][feature] * of_gamma, on_s += s.gain[1][feature] * of_gamma;
        d = rstd * (d * (1 + s.gain[2][feature]) - of_d - o[feature] * projected);
        if (feature >= a.D) d = 0;
      }
      s.d2[t][feature] = from_float<T>(d);
      of_d2 += d * d, of_k += k * k;
    }
    on_w = over_sharing(on_w), on_s = over_sharing(on_s);
    of_d2 = over_sharing(of_d2), of_k = over_sharing(of_k), of_gain = over_sharing(of_gain);
    if (thread % kSharing) return;
    s.rstd[t] = rstd, s.along[t] = projected * rstd;
    s.gain_on_w[t] = on_w, s.gain_on_s[t] = on_s;
    if (!clips()) return;
    float of_h = over_blocks(&s.hidden_norm[0][t]);
    s.h_norm[t] = of_h, s.d2_norm[t] = of_d2, s.k_norm[t] = of_k;
    s.norm[t] = of_d2 * of_h + of_gain;
  }

  // --- gradients of a tile ---------------------------------------------------------------------

  // δ1; then Gx of the first layer, Gδ of the last, and this block's sums of each token.
  MAL_DEVICE void factors(float (&gx)[kNarrow][4], float (&gd)[kNarrow][4]) const {
    float sums[kSums][2] = {};  // of this thread's two tokens
    if (is_deep()) {
      float u[kNarrow][4] = {};
      multiply<kD, true>(u, s.d2, narrow.row, s.w2, narrow.column);
      each_narrow([&](int n, int i, int token, int unit) {
        s.d1[token][unit] = from_float<T>(u[n][i] * s.slope[token][unit]);
        s.curve[token][unit] *= u[n][i];
        float d = to_float(s.d1[token][unit]);
        sums[kDelta1][i / 2] += d * d;
      });
      through<false>(gx, sums, s.k[0], s.dw1, s.ds1, s.d1);
    }
    through<true>(gd, sums, s.d2, s.last[0], s.last[1], s.h);
    store_sums(sums);
  }

  // g = -(w x dW + E x dS), and the sums of x dW and x dS with `y`.
  template <bool kTransposed, class X, class Matrix>
  MAL_DEVICE void through(float (&g)[kNarrow][4], float (&sums)[kSums][2], const X& x,
                          const Matrix& dw, const Matrix& ds, const Units& y) const {
    each_product<kTransposed>(x, dw, [&](int n, int i, int token, int unit, float product) {
      sums[kOnW][i / 2] += product * to_float(y[token][unit]);
      g[n][i] = -s.on_w[token] * product;
    });
    each_product<kTransposed>(x, ds, [&](int n, int i, int token, int unit, float product) {
      sums[kOnS][i / 2] += product * to_float(y[token][unit]);
      g[n][i] -= s.on_s[token] * product;
    });
  }

  // Calls `each` with this thread's numbers of x w, a tile of hidden units.
  template <bool kTransposed, class X, class Matrix, class Each>
  MAL_DEVICE void each_product(const X& x, const Matrix& w, Each each) const {
    float product[kNarrow][4] = {};
    multiply<kD, kTransposed>(product, x, narrow.row, w, narrow.column);
    each_narrow([&](int n, int i, int token, int unit) { each(n, i, token, unit, product[n][i]); });
  }

  // Σ over the hidden units of all blocks.
  MAL_DEVICE float over_units(Sum sum, int token) const {
    float total = 0;
#pragma unroll
    for (int i = 0; i < kWarps / kTile; i++) total += over_blocks(&s.sums[i][sum][token]);
    return total;
  }

  // ρ and the gradients of wρ, Eρ, θ and, as q, of ‖g‖².
  MAL_DEVICE void rates(int token, int count) const {
    if (thread >= kTokens) {
      int i = thread - kTokens;
      if (i < 3) s.total_dots[i] = over_blocks(&s.dots[i]);
      return;
    }
    const int t = thread;
    float clip = 1, square = 0, least = static_cast<float>(a.max_grad_norm * a.max_grad_norm);
    if (clips()) {
      s.d1_norm[t] = is_deep() ? over_units(kDelta1, t) : 0;
      square = s.norm[t] + s.k_norm[t] * s.d1_norm[t];
      clip = static_cast<float>(a.max_grad_norm) * rsqrtf(max(square, least));
    }
    float rate = s.lr[t] * clip;
    float d_on_w = -over_units(kOnW, t) - s.gain_on_w[t];
    float d_on_s = -over_units(kOnS, t) - s.gain_on_s[t];
    float d_rate = s.on_w[t] * d_on_w + s.on_s[t] * d_on_s;
    const int64_t at = t < count ? (begin + token + t) * a.H + head : -1;
    d_rate += of_read(to.read.rate, at);
    s.read_momentum[t] = of_read(to.read.momentum, at);
    s.read_decay[t] = of_read(to.read.decay, at);
    s.rate[t] = rate;
    s.d_on_w[t] = d_on_w * rate, s.d_on_s[t] = d_on_s * rate;
    s.clip[t] = clips() && square > least ? -d_rate * rate / square : 0;
    if (!rank && t < count) to.d_lr[at] = d_rate * clip;
  }

  // The gradients of momentum and decay: coefficients() backwards, by one thread.
  MAL_DEVICE void gates(const TileOfRow& tile) const {
    const int token = tile.token, count = tile.count;
    if (rank || thread != kThreads - 1) return;
    float d_beta = s.total_dots[0], d_f = s.total_dots[1], d_epsilon = s.total_dots[2];
    if (!a.token_steps) {
      if (tile.index) return;
      int64_t gates = a.cu_seqlens ? a.first_gate[row] : row * a.chunk_gates;
      int64_t at = (gates + tile.chunk) * a.H + head;
      if (to.d_decay) to.d_decay[at] = -d_beta;
      if (to.d_momentum) to.d_momentum[at] = d_f + d_epsilon;
      return;
    }
    float beta = 1, f = 0, epsilon = 1;
#pragma unroll 1
    for (int t = 0; t < count; t++) {
      s.of_kept[t] = beta, s.f_before[t] = f, s.of_momentum[t] = epsilon;  // before the token
      beta *= 1 - s.decay[t];
      epsilon *= s.momentum[t];
      f = (1 - s.decay[t]) * f + epsilon;
    }
    float after = 1;  // A of the token
#pragma unroll 1
    for (int t = count - 1; t >= 0; t--) {
      float kept = 1 - s.decay[t];
      d_epsilon += d_f;
      s.of_kept[t] = d_beta * s.of_kept[t] + d_f * s.f_before[t];
      s.of_momentum[t] *= d_epsilon;
      s.after[t] = after;
      d_beta *= kept, d_f *= kept, d_epsilon *= s.momentum[t], after *= kept;
    }
    // w, E and A run from the last token, so their gradients from the first
    float d_w = 0, d_e = 0, d_after = 0;
#pragma unroll 1
    for (int t = 0; t < count; t++) {
      int64_t at = (begin + token + t) * a.H + head;
      if (to.d_decay) to.d_decay[at] = s.read_decay[t] - s.of_kept[t] - d_after * s.after[t];
      if (to.d_momentum)
        to.d_momentum[at] =
            s.read_momentum[t] + s.of_momentum[t] + d_w * s.on_w[t] + d_e * s.on_s[t];
      d_w = s.momentum[t] * d_w + s.d_on_w[t];
      d_e = s.momentum[t] * d_e + s.d_on_s[t];
      d_after = (1 - s.decay[t]) * d_after + d_w;
    }
  }

  // What the read gives to the number at `at`, if it exists and there was a read.
  MAL_DEVICE float of_read(const float* from, int64_t at) const {
    return from && at >= 0 ? from[at] : 0;
  }

  // du, and what dz is but for the network's own part.
  MAL_DEVICE void through_hidden(const float (&gx)[kNarrow][4], const float (&gd)[kNarrow][4],
                                 const TileOfRow& tile) const {
    each_narrow([&](int n, int i, int token, int unit) {
      float rate = s.rate[token], q = s.clip[token];
      bool exists = token < tile.count && rank * kHidden + unit < a.E;
      int64_t at = ((begin + tile.token + token) * a.H + head) * a.E + rank * kHidden + unit;
      float of_h = rate * gd[n][i] + of_read(to.read.h, exists ? at : -1);
      float of_d1 = rate * gx[n][i] + of_read(to.read.d1, exists ? at : -1);
      if (clips()) of_h += q * s.d2_norm[token] * to_float(s.h[token][unit]);
      float& dz = s.curve[token][unit];
      if (!is_deep()) {
        dz = of_h;
        return;
      }
      if (clips()) of_d1 += q * s.k_norm[token] * to_float(s.d1[token][unit]);
      float slope = s.slope[token][unit];
      s.du[token][unit] = from_float<T>(of_d1 * slope);
      dz = of_d1 * dz + of_h * slope;
    });
  }

  // -ρ (w x dW + E x dS) of hidden units `x`, plus y W; of this block.
  template <bool kTransposed, class Matrix>
  MAL_DEVICE void from_units(float (&sum)[kWide][4], const Units& x, const Matrix& dw,
                             const Matrix& ds, const Units& y, const Matrix& w) const {
    float of_s[kWide][4] = {};
    start_multiply<kHidden, kTransposed>(sum, x, wide.row, dw, wide.column);
    start_multiply<kHidden, kTransposed>(of_s, x, wide.row, ds, wide.column);
    finish(sum, of_s);
    each_wide([&](int n, int i, int token, int) {
      sum[n][i] = -s.rate[token] * (s.on_w[token] * sum[n][i] + s.on_s[token] * of_s[n][i]);
    });
    if (is_deep()) multiply<kHidden, kTransposed>(sum, y, wide.row, w, wide.column);
  }

  // This block's part of dδ2.
  MAL_DEVICE void project_gradients() const {
    float sum[kWide][4] = {};
    from_units<false>(sum, s.h, s.last[0], s.last[1], s.du, s.w2);
    each_wide([&](int n, int i, int token, int feature) { part[token][feature] = sum[n][i]; });
  }

  // Sums dδ2 over the blocks; from it do, dV, dγ of the anchor and what K has of the error.
  MAL_DEVICE void error_gradients(int token, int count) const {
    const int t = thread / kSharing;
    const int64_t at = (begin + token + t) * a.H + head;
    const float d_surprise = t < count ? to.d_surprise[at] : 0;
    float d_delta[kShare] = {};
#pragma unroll 1
    for (int r = 0; r < blocks; r++) {
      const float* from = map_shared(part[t], r);
#pragma unroll
      for (int i = 0; i < kShare; i += 4) {
        auto four = four_at(from[feature_of(i)]);
#pragma unroll
        for (int j = 0; j < 4; j++) d_delta[i + j] += four.at[j];
      }
    }
    if (to.read.d2) {
#pragma unroll
      for (int i = 0; i < kShare; i++)
        d_delta[i] += of_read(to.read.d2, feature_at(feature_of(i), token, count));
    }
    if (clips()) {
#pragma unroll
      for (int i = 0; i < kShare; i++)
        d_delta[i] += s.clip[t] * s.h_norm[t] * to_float(s.d2[t][feature_of(i)]);
    }
    if (has_gain()) return through_norm(d_delta, d_surprise, token, count);
#pragma unroll
    for (int i = 0; i < kShare; i += 4) {
      float d_value[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int feature = feature_of(i + j);
        float e = error_of(own[t][feature], feature, 0);
        float d_error = 2 * (d_surprise * e + d_delta[i + j]);
        d_value[j] = -d_error;
        d_output[t][feature] = from_float<T>(d_error);
        own[t][feature] = of_key(0, feature, token, count);
      }
      if (stores(count)) store_four(to.d_v, d_value, feature_of(i), token);
    }
  }

  // Where a feature of this thread's token stands, -1 if it does not exist.
  MAL_DEVICE int64_t feature_at(int feature, int token, int count) const {
    const int t = thread / kSharing;
    if (t >= count || feature >= a.D) return -1;
    return ((begin + token + t) * a.H + head) * a.D + feature;
  }

  // What this block gives to dK besides its hidden units: the error's part, the clip's and what the
  // scores of the read give.
  MAL_DEVICE float of_key(float d_error, int feature, int token, int count) const {
    int t = thread / kSharing;
    if (rank) return 0;
    d_error += of_read(to.read.k, feature_at(feature, token, count));
    if (!clips() || !is_deep()) return d_error;
    return d_error + s.clip[t] * s.d1_norm[t] * to_float(s.k[0][t][feature]);
  }

  // Whether this block stores what all of them know of this thread's token.
  MAL_DEVICE bool stores(int count) const {
    unsigned t = thread / kSharing;
    return static_cast<int>(t) < count && (t & (blocks - 1)) == rank;
  }

  // Four of its features, into dK or dV.
  MAL_DEVICE void store_four(void* tensor, const float (&x)[4], int feature, int token) const {
    if (feature >= a.D) return;
    int64_t at = ((begin + token + thread / kSharing) * a.H + head) * a.D + feature;
    auto& four = four_at(static_cast<T*>(tensor)[at]);
#pragma unroll
    for (int j = 0; j < 4; j++) four.at[j] = from_float<T>(x[j]);
  }

  struct Errors {
    float error, gain, normed;  // gradients of e, γ and of what LayerNorm gives
  };

  // error_gradients() through LayerNorm: δ2 = P d σ with d = 2 e ⊙ gain and its projection P.
  MAL_DEVICE void through_norm(float (&d_delta)[kShare], float d_surprise, int token,
                               int count) const {
    const int t = thread / kSharing;
    const float rstd = s.rstd[t], q = s.clip[t], rate = s.rate[t];
    const float along_d = s.along[t], on_w = rate * s.on_w[t], on_s = rate * s.on_s[t];
    float* o = own[t];
    float sum = 0, projected = 0, with_delta = 0;
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      sum += d_delta[i], projected += d_delta[i] * o[feature_of(i)];
      with_delta += d_delta[i] * to_float(s.d2[t][feature_of(i)]);
    }
    const float mean = over_sharing(sum) / a.D, along = over_sharing(projected) / a.D;
    const float scale = over_sharing(with_delta) * rstd / a.D;
    auto through = [&](int feature, float d_delta) -> Errors {
      if (feature >= a.D) return {};
      float normed = o[feature], e = error_of(normed, feature, 0), gain = 1 + s.gain[2][feature];
      float d = rstd * (d_delta - mean - normed * along);
      float d_gamma = 2 * q * e * normed  // of γ's own gradient 2 e ⊙ normed
                      - on_w * s.gain[0][feature] - on_s * s.gain[1][feature] +
                      of_read(to.read.gain, feature_at(feature, token, count));
      float d_error = 2 * (d_surprise * e + d * gain + d_gamma * normed);
      float d_normed = 2 * d_gamma * e + d_error * gain - d_delta * along_d;
      return {d_error, 2 * d * e + d_error * normed, d_normed - 2 * e * gain * along * rstd};
    };
    float d_sum = 0, d_projected = 0;
#pragma unroll
    for (int i = 0; i < kShare; i += 4) {
      float d_value[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int feature = feature_of(i + j);
        Errors of = through(feature, d_delta[i + j]);
        d_value[j] = -of.error;
        d_sum += of.normed, d_projected += of.normed * o[feature];
#pragma unroll
        for (int mask = kSharing; mask < 32; mask *= 2)
          of.gain += __shfl_xor_sync(~0u, of.gain, mask);
        if (lane < kSharing) s.gain_sums[warp][feature] = of.gain;
      }
      if (stores(count)) store_four(to.d_v, d_value, feature_of(i), token);
    }
    const float d_mean = over_sharing(d_sum) / a.D, d_along = over_sharing(d_projected) / a.D;
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      int feature = feature_of(i);
      Errors of = through(feature, d_delta[i]);
      float normed = o[feature];
      float d = rstd * (of.normed - d_mean - normed * d_along) - normed * scale;
      d_output[t][feature] = from_float<T>(feature < a.D ? d : 0);
      o[feature] = of_key(of.error, feature, token, count);
    }
  }

  // dz; at depth 1, where z is K, into this block's part of dK.
  MAL_DEVICE void through_network() const {
    float d[kNarrow][4] = {};
    multiply<kD, true>(d, d_output, narrow.row, s.w2, narrow.column);
    each_narrow([&](int n, int i, int token, int unit) {
      float dz = s.curve[token][unit] + d[n][i] * (is_deep() ? s.slope[token][unit] : 1);
      int feature = rank * kHidden + unit;
      if (is_deep())
        s.dz[token][unit] = from_float<T>(dz);
      else if (feature < kD)
        own[token][feature] += dz;
    });
  }

  // This block's part of dK.
  MAL_DEVICE void key_gradients() const {
    if (!is_deep()) return;
    float sum[kWide][4] = {};
    from_units<true>(sum, s.d1, s.dw1, s.ds1, s.dz, s.w1);
    each_wide([&](int n, int i, int token, int feature) { own[token][feature] += sum[n][i]; });
  }

  MAL_DEVICE void anchor_gradients() {
    if (is_deep()) {
      start_multiply_transposed(a1, s.k[0], s.dz, first);
      start_multiply_transposed(a2, s.du, s.d2, last);
      finish(a1, a2);
    }
    multiply_transposed(a2, s.h, d_output, last);
    if (!has_gain() || thread >= kD) return;
    for (int w = 0; w < kWarps; w++) s.gain[3][thread] += s.gain_sums[w][thread];
  }

  MAL_DEVICE void store_keys(int token, int count) const {
    if (!stores(count)) return;
#pragma unroll 2
    for (int i = 0; i < kShare; i += 4) {
      auto sum = four_over_blocks(&own[thread / kSharing][feature_of(i)]);
      store_four(to.d_k, sum.at, feature_of(i), token);
    }
  }

  // dS ← ε dS + f dW, dW ← β dW and dW_init += (1 - β) dW
  template <int kCount>
  MAL_DEVICE void decay(float (&dw)[kCount][4], float (&ds)[kCount][4], const Slice& slice,
                        float* d_init) {
    float beta = s.beta, f = s.f, epsilon = s.epsilon;
    if (d_init && beta != 1)
      slice.each(dw, [&](int n, int i, int64_t at) {
        if (at >= 0) d_init[at] += (1 - beta) * dw[n][i];
      });
#pragma unroll
    for (int n = 0; n < kCount; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        ds[n][i] = epsilon * ds[n][i] + f * dw[n][i];
        dw[n][i] *= beta;
      }
  }

  // What the reads of the tile in `slot` give to the state before it and to init; with chunk steps
  // to the anchor alone.
  MAL_DEVICE void add_read(int64_t slot) {
    const mal_read_gradients& read = to.read;
    if (!read.tile_weights.last) return;
    const Slice of_first = first_slice(slot), of_last = last_slice(slot);
    if (a.token_steps) {
      add_layer(w1, of_first, read.tile_weights.first);
      add_layer(w2, of_last, read.tile_weights.last);
      add_layer(s1, of_first, read.tile_trace.first);
      add_layer(s2, of_last, read.tile_trace.last);
    } else {
      add_layer(a1, of_first, read.tile_weights.first);
      add_layer(a2, of_last, read.tile_weights.last);
    }
    const int64_t layer = (row - slot) * a.H * a.D * a.E;
    add_init(w1, of_first, to.d_init.first, layer, read.tile_init.first);
    add_init(w2, of_last, to.d_init.last, layer, read.tile_init.last);
    if (!has_gain() || thread >= a.D) return;
    const int64_t at = gain_at(thread, slot);
    s.gain[a.token_steps ? 0 : 3][thread] += read.tile_weights.gain[at];
    if (read.tile_trace.gain) s.gain[1][thread] += read.tile_trace.gain[at];
    if (read.tile_init.gain && !rank)
      to.d_init.gain[gain_at(thread, row)] += read.tile_init.gain[at];
  }

  template <int kCount>
  MAL_DEVICE void add_layer(float (&w)[kCount][4], const Slice& slice, const float* from) const {
    if (!from) return;
    slice.each(w, [&](int n, int i, int64_t at) {
      if (at >= 0) w[n][i] += from[at];
    });
  }

  template <int kCount>
  MAL_DEVICE void add_init(const float (&like)[kCount][4], const Slice& slice, float* d_init,
                           int64_t init_at, const float* from) const {
    if (!from) return;
    slice.each(like, [&](int, int, int64_t at) {
      if (at >= 0) d_init[at + init_at] += from[at];
    });
  }

  MAL_DEVICE void retreat() {
    if (is_deep()) decay(w1, s1, first_slice(row), to.d_init.first);
    decay(w2, s2, last_slice(row), to.d_init.last);
    if (!has_gain() || thread >= a.D) return;
    float& dw = s.gain[0][thread];
    float& ds = s.gain[1][thread];
    if (to.d_init.gain && !rank) to.d_init.gain[gain_at(thread, row)] += (1 - s.beta) * dw;
    ds = s.epsilon * ds + s.f * dw;
    dw *= s.beta;
  }

  // --- a row -----------------------------------------------------------------------------------

  // `opens`: it is the first of a chunk whose anchor is W there.
  MAL_DEVICE void tile(const TileOfRow& tile, bool opens, int slot) {
    const int token = tile.token, count = tile.count;
    locate();
    fetch(token, count, 0);
    load_gates(token, count, tile.chunk);
    round_gradients();
    if (wants_gates()) dot_states(slot);
    copy_wait<0>();
    block_sync();  // all of this tile is there
    locate();
    activations();
    coefficients(count, opens);
    block_sync();  // h
    locate();
    project(0);
    if (wants_gates()) sum_dots();
    cluster_sync();  // h W2, of every block
    locate();
    error();
    block_sync();  // δ2
    locate();
    float gx[kNarrow][4], gd[kNarrow][4];
    factors(gx, gd);
    cluster_sync();  // the sums of tokens, of every block
    locate();
    rates(token, count);
    block_sync();  // ρ and q
    locate();
    if (wants_gates()) gates(tile);
    through_hidden(gx, gd, tile);
    block_sync();  // du
    locate();
    project_gradients();
    cluster_sync();  // dδ2, of every block; dW2 and dS2 have been read
    locate();
    error_gradients(token, count);
    block_sync();  // do
    locate();
    through_network();
    block_sync();  // dz
    locate();
    key_gradients();
    anchor_gradients();
    cluster_sync();  // dK, of every block
    locate();
    store_keys(token, count);
    retreat();
    add_read(slot);
  }

  MAL_DEVICE void walk() {
    const int start = a.position ? a.position[row] : 0;
    int slot = to.first_tile[row] + tiles_of_row(length, start, chunk_size);
    load_gradients();
    for (int end = length; end > 0;) {
      const TileOfRow last = last_tile(end, start, chunk_size);
      const bool is_begun = last.chunk == 0 && start > 0;  // its anchor is given
      slot--;
      if (end == length || (start + end) % chunk_size == 0)
        set_anchor(is_begun ? a.anchor : to.tile_weights, is_begun ? row : slot - last.index);
      const bool opens = last.index == 0 && !is_begun;
      tile(last, opens, slot);
      if (opens) join_anchor();
      end = last.token;
    }
    if (length == 0 && start == 0) join_anchor();
    store_gradients();
    cluster_sync();  // no block leaves while another reads its shared memory
  }
};

template <class T, int kD>
MAL_KERNEL(kThreads, 1) write_bwd(mal_write_bwd_args a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // never launched on a GPU without clusters
  Backward<T, kD>(a).walk();
#endif
}

}  // namespace
}  // namespace mal::memory

MAL_API int mal_write_bwd(const mal_write_bwd_args* a) {
  using namespace mal::memory;
  return for_type_of(a->call, [&]<class T, int kD>() {
    return launch_clusters<Shared<T, kD>>(write_bwd<T, kD>, a->call, a->call.rows, a->stream,
                                          *a);
  });
}
