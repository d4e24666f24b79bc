// The gradients of the causal read of neural_memory_fwd.cu, of all tiles at once.
//
// Given W and S before a tile, which the forward has left in global memory, a tile's read depends
// on nothing of the other tiles. A cluster takes a tile of a row's head, in the layouts of the
// forward, and computes the factors of the tile's gradients and its read again. In each layer, with
// c_ts = -w_ts θ_s, clipped δ and β, f, w of every token,
//
//     z_t = β_t x_t W + f_t x_t S + (1 - β_t) x_t W_init + Σ_s c_ts ⟨x_t, y_s⟩ δ_s
//
// where x is q, then hq, and y is k, then h. From dz, which is do at the last layer, come
//
//     scores     R = dz δᵀ, C = c ⊙ R;  dc += (x yᵀ) ⊙ R;  dδ = (c ⊙ (x yᵀ))ᵀ dz;  dy = Cᵀ x
//     input      dx = β ⊙ (dz Wᵀ) + f ⊙ (dz Sᵀ) + (1 - β) ⊙ (dz W_initᵀ) + C y
//     states     dW = (β ⊙ x)ᵀ dz, dS = (f ⊙ x)ᵀ dz, dW_init = ((1 - β) ⊙ x)ᵀ dz
//     factors    dβ_t += ⟨x_t, dz_t (W - W_init)ᵀ⟩, df_t += ⟨x_t, dz_t Sᵀ⟩
//
// and dzq = dhq ⊙ act'(zq) between the two layers. With LayerNorm do is what it leaves of the
// output's gradient, and γ is a layer of its own: walked to from token to token, and back. Then
//
//     rate       dρ_s = -Σ_t w_ts dc_ts / clip_s;  dw_ts = -θ_s dc_ts
//     gates      columns of w and E, and that of f and ε, backwards from the last token:
//                Dw ← (1 - α_t+1) Dw + dw_ts, De ← η_t+1 De + Dw;  dα_t -= Dw w_t-1,s,
//                dη_t += De E_t-1,s
//
// The gradients of δ, of y = k or h, of ρ and of the gates go through global memory to
// write_bwd.cu, which adds them to those of the write; so do those of the state before the
// tile. With chunk steps tokens read M(q) at the anchor: β = 1, f = c = 0, and dW is the anchor's.
//
// Sums over the hidden units, and so over the blocks: h W2 and the norms of its gradient, as in the
// forward; hq W2 where LayerNorm follows; dδ2; dk and dq; and the sums of each token.
#include "write_bwd.h"
#include "causal_read.cuh"

namespace mal::memory {
namespace {

// W, S and W_init of a layer.
template <class Matrix>
struct States {
  Matrix w, trace, init;
};

// c ⊙ (x yᵀ) and C of a layer.
template <class T>
struct Scores {
  Tile<T, kTokens, kTokens> value, gradient;
};

template <class T, int kD>
struct Anchor {
  Tile<T, kD, units_for(kD)> w1;
  Tile<T, units_for(kD), kD> w2;
};

// A column of w for each token of the tile, and behind them f and β.
constexpr int kOfState = kTokens, kOfBeta = kTokens + 1, kColumns = kTokens + 2;
using Columns = float[kTokens][kColumns];

enum Dot { kOnWeights, kOnTrace, kOnInit, kDots };  // ⟨x, dz Wᵀ⟩, S and W_init, of each token

template <class T, int kD>
using Part = float[kTokens][kD + 4];

template <class T, int kD>
struct PartAndStates {
  Part<T, kD> part;
  alignas(1024) States<Tile<T, kD, units_for(kD)>> states;
};

template <class T, int kD>
struct Shared : Anchor<T, kD> {  // then Scores; or dγ of every token, in 16 bits
  using Number = T;
  static constexpr int kFeatures = kD, kHidden = units_for(kD);
  Tile<T, kTokens, kD> k[1];
  Tile<T, kTokens, kD> v[1];  // then the factor of γ in the clipped gradient, in 16 bits
  Tile<T, kTokens, kD> q;
  Tile<T, kTokens, kD> d_out;  // dy, then do
  Tile<T, kTokens, kD> d2;
  Tile<T, kTokens, kHidden> h;  // then dzq
  Tile<T, kTokens, kHidden> d1;
  Tile<T, kTokens, kHidden> hq;
  float slope[kTokens][kHidden + kPad];  // z, then act'(z); each number its thread's own
  union {
    // this block's parts of sums over the blocks; the second moreover γ of every token, then dγ
    Part<T, kD> part[2];
    PartAndStates<T, kD> states;  // instead of the second, the states of a layer
  };
  Columns columns;                                     // then what decay's gradient is the sum of
  float sums[kWarps * 16 / kTokens][kDots][kTokens];   // of the warps that share a token
  float gain_dots[kDots][kTokens];                     // what γ adds to them
  float hidden_norm[1][kTokens], d1_norm[1][kTokens];  // ‖h‖² and ‖δ1‖², of this block
  float norm[kTokens], k_norm[kTokens], clip[kTokens];
  float lr[kTokens], momentum[kTokens], decay[kTokens];
  float on_w[kTokens], on_s[kTokens], beta, f, epsilon;          // those of the write
  float of_w[kTokens], of_s[kTokens], of_init[kTokens];          // β, f and 1 - β of every token
  float d_rate[kTokens], d_momentum[kTokens], d_decay[kTokens];  // of this block
  float gain[3][kD];                                             // γ: of W, of S, of the anchor
};

template <class T, int kD>
struct ReadBackward : Read<Shared<T, kD>> {
  using Base = Read<Shared<T, kD>>;
  using typename Base::Slice, typename Base::Tokens, typename Base::Units;
  using Base::a, Base::s, Base::thread, Base::lane, Base::warp, Base::rank, Base::blocks;
  using Base::head, Base::row, Base::begin, Base::length, Base::chunk_size, Base::kHidden;
  using Base::kTile, Base::kWide, Base::kNarrow, Base::kOfW1, Base::kOfW2, Base::kShare;
  using Base::kScores, Base::wide, Base::narrow, Base::first, Base::last, Base::first_slice;
  using Base::last_slice, Base::gain_at, Base::is_deep, Base::has_gain, Base::clips;
  using Base::store_layer, Base::fetch, Base::load_gates, Base::coefficients, Base::each_of;
  using Base::each_narrow, Base::take_units, Base::activate_all, Base::find_factors;
  using Base::exchange_norms, Base::scale_coefficients, Base::clip, Base::store_part;
  using Base::store_sums, Base::over_sharing, Base::over_blocks, Base::four_over_blocks;
  using Base::feature_of;
  using First = Tile<T, kD, kHidden>;
  using Last = Tile<T, kHidden, kD>;

  const mal_causal_read_bwd_args& from;
  const mal_read_gradients& to;
  const int64_t slot;  // of the tile
  const TileOfRow tile;
  const bool steps = a.token_steps;                         // every token's own weights
  const int64_t source = steps ? slot : slot - tile.index;  // of the state that is read
  Place square = part_of(warp, kTile, 8 * kScores);
  Anchor<T, kD>& anchor = s;
  Scores<T>& scores = in_place_of<Scores<T>>(anchor);
  Tokens& d_gain = in_place_of<Tokens>(anchor);
  Units& dz = s.h;
  float dc[kScores][4] = {};
  float dots[kDots][2] = {};  // of this thread's two tokens

  MAL_DEVICE ReadBackward(const mal_causal_read_bwd_args& arguments, int64_t slot, int row)
      : Base(arguments.call, row),
        from(arguments),
        to(arguments.to),
        slot(slot),
        tile(tile_of_row(slot - from.first_tile[row], length, start(), chunk_size)) {}

  MAL_DEVICE int start() const { return a.position ? a.position[row] : 0; }
  MAL_DEVICE int64_t token_at(int token) const { return (begin + tile.token + token) * a.H + head; }

  // As Base::locate(), but the row is that of the tile.
  MAL_DEVICE void locate() {
    int of_tile;
    reread(row, of_tile);
    Base::locate();
    row = of_tile;
    square = part_of(warp, kTile, 8 * kScores);
  }

  // --- what the forward computed ---------------------------------------------------------------

  MAL_DEVICE void load_tile() {
    fetch(s.q, a.q, tile.token, tile.count);
    fetch(s.d_out, from.d_output, tile.token, tile.count);
    if (steps) {
      fetch(s.k[0], a.k, tile.token, tile.count);
      fetch(s.v[0], a.v, tile.token, tile.count);
      load_gates(tile.token, tile.count, tile.chunk);
      if (is_deep()) copy_first(s.w1, anchor_state().first, anchor_slot());
      copy_last(s.w2, anchor_state().last, anchor_slot());
    }
    if (has_gain() && thread < kD) {
      s.gain[0][thread] = gain_of(from.tile_weights, source);
      s.gain[1][thread] = gain_of(from.tile_trace, source);
      s.gain[2][thread] = gain_of(anchor_state(), anchor_slot());
    }
    copy_commit();
    copy_wait<0>();
  }

  // Where the anchor of the tile stands.
  MAL_DEVICE bool is_begun() const { return tile.chunk == 0 && start() > 0; }  // it is given
  MAL_DEVICE const mal_state& anchor_state() const {
    return is_begun() ? a.anchor : from.tile_weights;
  }
  MAL_DEVICE int64_t anchor_slot() const { return is_begun() ? row : slot - tile.index; }

  MAL_DEVICE float gain_of(const mal_state& state, int64_t slot) const {
    return thread < a.D ? state.gain[gain_at(thread, slot)] : 0;
  }

  // This block's part of a layer of the state in `slot`, for the products.
  MAL_DEVICE void copy_first(First& to, const float* layer, int64_t slot) const {
    copy_layer(to, layer, slot, a.D, a.E, 0, rank * kHidden);
  }
  MAL_DEVICE void copy_last(Last& to, const float* layer, int64_t slot) const {
    copy_layer(to, layer, slot, a.E, a.D, rank * kHidden, 0);
  }
  template <class Matrix>
  MAL_DEVICE void copy_layer(Matrix& to, const float* layer, int64_t slot, int rows, int columns,
                             int above, int left) const {
    layer += ((slot * a.H + head) * rows + above) * columns + left;
#pragma unroll 4
    for (int i = thread; i < Matrix::kRows * Matrix::kColumns; i += kThreads) {
      int row = i / Matrix::kColumns, column = i % Matrix::kColumns;
      bool exists = row < rows - above && column < columns - left;
      to[row][column] = from_float<T>(exists ? layer[int64_t{row} * columns + column] : 0);
    }
  }

  // w, β and f of every token, also of those that do not exist.
  MAL_DEVICE void every_coefficient() {
    if (!steps) {
      if (thread < kTokens) s.of_w[thread] = 1;
      return;
    }
    coefficients(kTokens, false, [&](int t, float w, float, float beta) {
      s.columns[t][thread] = w;
      if (thread != kOfState) return;
      s.of_w[t] = s.columns[t][kOfBeta] = beta;
      s.of_s[t] = w, s.of_init[t] = 1 - beta;
    });
  }

  // h, the clipped δ and the coefficients.
  MAL_DEVICE void find_write() {
    find_factors(tile.token, tile.count, 0, nullptr);
    exchange_norms(0, true);
    every_coefficient();
    scale_coefficients(0);
    block_sync();  // δ1 and how much is clipped
    if (clips()) clip(0);
    if (!has_gain()) return;
    const int t = thread / kSharing;
#pragma unroll 4
    for (int i = 0; i < kShare; i++)
      s.v[0][t][feature_of(i)] = from_float<T>(s.part[1][t][feature_of(i)]);
  }

  MAL_DEVICE float coefficient(int t, int of) const { return -s.lr[of] * s.columns[t][of]; }
  MAL_DEVICE float clip_of(int t) const { return clips() ? s.clip[t] : 1; }

  MAL_DEVICE States<First>& first_states() const { return s.states.states; }
  MAL_DEVICE States<Last>& last_states() const {
    return in_place_of<States<Last>>(s.states.states);
  }

  MAL_DEVICE void set_first() const {
    copy_first(first_states().w, from.tile_weights.first, source);
    if (!steps) return;
    copy_first(first_states().trace, from.tile_trace.first, source);
    if (a.init.last) copy_first(first_states().init, a.init.first, row);
  }

  MAL_DEVICE void set_last() const {
    copy_last(last_states().w, from.tile_weights.last, source);
    if (!steps) return;
    copy_last(last_states().trace, from.tile_trace.last, source);
    if (a.init.last) copy_last(last_states().init, a.init.last, row);
  }

  // Calls `each` with the states of a layer that a token's weights are made of: which of the dots,
  // the matrix and its share of every token.
  template <class Matrix, class Each>
  MAL_DEVICE void each_state(const States<Matrix>& states, Each each) const {
    each(kOnWeights, states.w, s.of_w);
    if (!steps) return;
    each(kOnTrace, states.trace, s.of_s);
    if (a.init.last) each(kOnInit, states.init, s.of_init);
  }

  // sum += x_t W_t of every token t, with the factors y and d of the gradients. Where there are
  // any, all threads meet.
  template <int kDepth, int kCount, class X, class Matrix, class D>
  MAL_DEVICE void read_layer(float (&sum)[kCount][4], Place part, const States<Matrix>& states,
                             const X& x, const X& y, const D& d) const {
    each_state(states, [&](Dot, const Matrix& w, const float* of) {
      Base::template add_product<kDepth>(sum, part, x, w, of);
    });
    if (!steps) return;
    float product[kScores][4] = {};
    multiply<kDepth, true>(product, x, square.row, y, square.column);
    Base::template each_of<kScores>(square, [&](int n, int i, int t, int of) {
      scores.value[t][of] = from_float<T>(coefficient(t, of) * product[n][i]);
    });
    block_sync();  // the scores
    multiply<kTokens, false>(sum, scores.value, part.row, d, part.column);
  }

  // hq and act'(zq)
  MAL_DEVICE void read_hidden() {
    if (!is_deep()) return take_units(s.q, s.hq);
    float z[kNarrow][4] = {};
    read_layer<kD>(z, narrow, first_states(), s.q, s.k[0], s.d1);
    activate_all(z, s.hq, [](int, int, float) {});
  }

  // This block's part of what LayerNorm is given.
  MAL_DEVICE void read_output() {
    float o[kWide][4] = {};
    read_layer<kHidden>(o, wide, last_states(), s.hq, s.h, s.d2);
    store_part(o, 0);
  }

  // --- LayerNorm and γ -------------------------------------------------------------------------

  // γ of this thread's feature at every token.
  MAL_DEVICE void walk_gain() const {
    float w = s.gain[0][thread], trace = s.gain[1][thread];
    const float init = a.init.gain ? a.init.gain[gain_at(thread, row)] : 0;
#pragma unroll 1
    for (int t = 0; t < kTokens; t++) {
      if (steps) {
        trace = s.momentum[t] * trace - s.lr[t] * to_float(s.v[0][t][thread]);
        w = (1 - s.decay[t]) * w + s.decay[t] * init + trace;
      }
      s.part[1][t][thread] = w;
    }
  }

  // From dy to do; dγ takes the place of γ.
  MAL_DEVICE void through_norm() const {
    const int t = thread / kSharing;
    float normed[kShare], d[kShare], total = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < kShare; i += 4) {
      auto four = four_over_blocks(&s.part[0][t][feature_of(i)]);
#pragma unroll
      for (int j = 0; j < 4; j++) normed[i + j] = four.at[j], total += four.at[j];
    }
    const float mean = over_sharing(total) / a.D;
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      normed[i] = feature_of(i) < a.D ? normed[i] - mean : 0;
      squares += normed[i] * normed[i];
    }
    const float rstd = rsqrtf(over_sharing(squares) / a.D + kLayerNormEpsilon);
    float sum = 0, along = 0;
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      normed[i] *= rstd;
      float dy = to_float(s.d_out[t][feature_of(i)]);
      float& gain = s.part[1][t][feature_of(i)];
      d[i] = feature_of(i) < a.D ? dy * (1 + gain) : 0;
      gain = dy * normed[i];
      d_gain[t][feature_of(i)] = from_float<T>(gain);
      sum += d[i], along += d[i] * normed[i];
    }
    sum = over_sharing(sum) / a.D, along = over_sharing(along) / a.D;
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      float of_o = rstd * (d[i] - sum - normed[i] * along);
      s.d_out[t][feature_of(i)] = from_float<T>(feature_of(i) < a.D ? of_o : 0);
    }
  }

  // ⟨dγ, γ⟩ of W, S and W_init, of each token.
  MAL_DEVICE void dot_gain() const {
    const int t = thread / kSharing;
    float sums[kDots] = {};
#pragma unroll 4
    for (int i = 0; i < kShare; i++) {
      int feature = feature_of(i);
      float d = s.part[1][t][feature];
      sums[kOnWeights] += d * s.gain[0][feature], sums[kOnTrace] += d * s.gain[1][feature];
      if (a.init.gain && feature < a.D) sums[kOnInit] += d * a.init.gain[gain_at(feature, row)];
    }
#pragma unroll
    for (int j = 0; j < kDots; j++) {
      sums[j] = over_sharing(sums[j]);
      if (thread % kSharing == 0) s.gain_dots[j][t] = sums[j];
    }
  }

  // walk_gain() backwards: γ of the states, and of each token's gradient.
  MAL_DEVICE void walk_gain_back() const {
    float d_w = 0, d_trace = 0, d_init = 0;
#pragma unroll 1
    for (int t = kTokens - 1; t >= 0; t--) {
      d_w += s.part[1][t][thread];
      if (!steps) continue;
      d_trace += d_w, d_init += s.decay[t] * d_w;
      if (t < tile.count)
        to.gain[token_at(t) * a.D + thread] = -s.lr[t] * clip_of(t) * d_trace;
      d_w *= 1 - s.decay[t], d_trace *= s.momentum[t];
    }
    int64_t at = gain_at(thread, slot);
    to.tile_weights.gain[at] = d_w;
    if (to.tile_trace.gain) to.tile_trace.gain[at] = d_trace;
    if (to.tile_init.gain) to.tile_init.gain[at] = d_init;
  }

  MAL_DEVICE void gain_gradients() {
    read_output();
    cluster_sync();  // the parts; the states have been read
    locate();
    if (thread < a.D) walk_gain();
    block_sync();  // γ
    locate();
    through_norm();
    cluster_sync();  // do and dγ; the parts have been read
    locate();
    if (rank == 0) {
      if (steps) {
        dot_gain();
        multiply<kD, true>(dc, d_gain, square.row, s.v[0], square.column);
      }
      if (thread < a.D) walk_gain_back();
    }
    block_sync();  // dγ has been read
    locate();
    set_last();
    block_sync();  // the states
    locate();
  }

  // --- the layers ------------------------------------------------------------------------------

  // c ⊙ (x yᵀ) and C = c ⊙ R with R = dz δᵀ; dc += (x yᵀ) ⊙ R.
  template <int kDepthX, int kDepthD, class X, class D>
  MAL_DEVICE void through_scores(const X& x, const X& y, const D& d_layer, const D& d) {
    float product[kScores][4] = {}, r[kScores][4] = {};
    multiply<kDepthX, true>(product, x, square.row, y, square.column);
    multiply<kDepthD, true>(r, d_layer, square.row, d, square.column);
    Base::template each_of<kScores>(square, [&](int n, int i, int t, int of) {
      float c = coefficient(t, of);
      dc[n][i] += product[n][i] * r[n][i];
      scores.value[t][of] = from_float<T>(c * product[n][i]);
      scores.gradient[t][of] = from_float<T>(c * r[n][i]);
    });
  }

  // dx += of ⊙ (dz Wᵀ) of every state; `also` is given every number of the products.
  template <int kDepth, int kCount, class D, class Matrix, class Also>
  MAL_DEVICE void through_states(float (&dx)[kCount][4], Place part, const D& d_layer,
                                 const States<Matrix>& states, Also also) const {
    each_state(states, [&](Dot dot, const Matrix& w, const float* of) {
      float product[kCount][4] = {};
      multiply<kDepth, true>(product, d_layer, part.row, w, part.column);
      Base::template each_of<kCount>(part, [&](int n, int i, int token, int column) {
        dx[n][i] += of[token] * product[n][i];
        also(dot, i, token, column, product[n][i]);
      });
    });
  }

  // The gradient of a layer of one of the states, (of ⊙ x)ᵀ dz.
  template <int kCount, class X, class D>
  MAL_DEVICE void store_state(const X& x, const D& d_layer, Place part, const Slice& slice,
                              const float* of, float* state) const {
    if (!state) return;
    float sum[kCount][4] = {};
#pragma unroll 1
    for (int t = 0; t < kTokens; t += 16) {
      uint32_t fx[4];
      load(fx, x, t, part.row, false, true);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int token = t + 8 * (i / 2) + 2 * (lane % 4);
        fx[i] = scaled<T>(fx[i], of[token], of[token + 1]);
      }
#pragma unroll
      for (int n = 0; n < kCount; n += 2) {
        uint32_t fd[4];
        load(fd, d_layer, t, part.column + 8 * n, true, true);
        mma(sum[n], fx, {fd[0], fd[1]}, T());
        mma(sum[n + 1], fx, {fd[2], fd[3]}, T());
      }
    }
    store_layer(sum, slice, state);
  }

  // scoresᵀ y of this block's hidden units, to those of all blocks.
  MAL_DEVICE void store_units(float* units, const Tile<T, kTokens, kTokens>& x, const Units& y,
                              bool is_clipped) const {
    float sum[kNarrow][4] = {};
    multiply_transposed(sum, x, y, narrow);
    each_narrow([&](int n, int i, int token, int unit) {
      int in_all = rank * kHidden + unit;
      if (token < tile.count && in_all < a.E)
        units[token_at(token) * a.E + in_all] = sum[n][i] * (is_clipped ? clip_of(token) : 1);
    });
  }

  // Calls `store` with each four features that are this thread's to sum over the blocks.
  template <class Store>
  MAL_DEVICE void each_sum(int turn, Store store) const {
    const int t = thread / kSharing;
    if (t >= tile.count || (t & (blocks - 1)) != static_cast<int>(rank)) return;
#pragma unroll 2
    for (int i = 0; i < kShare && feature_of(i) < a.D; i += 4)
      store(token_at(t) * a.D + feature_of(i), four_over_blocks(&s.part[turn][t][feature_of(i)]));
  }

  // dq, with what passes LayerNorm by.
  MAL_DEVICE T query(T dy, float d) const {
    return from_float<T>(has_gain() ? to_float(dy) + d : d);
  }
  MAL_DEVICE const T& dy_at(int64_t at) const { return static_cast<const T*>(from.d_output)[at]; }
  MAL_DEVICE T& query_at(int64_t at) const { return static_cast<T*>(from.d_q)[at]; }

  // dzq, at depth 1 dq; dh and dδ2.
  MAL_DEVICE void through_last(float (&d)[kNarrow][4]) {
    if (steps) {
      through_scores<kHidden, kD>(s.hq, s.h, s.d_out, s.d2);
      block_sync();  // the scores
      locate();
    }
    auto add_dot = [&](Dot dot, int i, int token, int unit, float product) {
      dots[dot][i / 2] += product * to_float(s.hq[token][unit]);
    };
    through_states<kD>(d, narrow, s.d_out, last_states(), add_dot);
    if (steps) {
      multiply<kTokens, false>(d, scores.gradient, narrow.row, s.h, narrow.column);
      store_units(to.h, scores.gradient, s.hq, false);
      float part[kWide][4] = {};
      multiply_transposed(part, scores.value, s.d_out, wide);
      store_part(part, 0);
    }
    cluster_sync();  // dδ2, of every block; h, the states and the scores have been read
    locate();
    each_narrow([&](int n, int i, int token, int unit) {
      int feature = rank * kHidden + unit;
      int64_t at = token_at(token) * a.D + feature;
      if (is_deep())
        d[n][i] *= s.slope[token][unit], dz[token][unit] = from_float<T>(d[n][i]);
      else if (token < tile.count && feature < a.D)
        query_at(at) = query(dy_at(at), d[n][i]);
    });
    if (steps)
      each_sum(0, [&](int64_t at, Vector<float, 4> sum) {
        Base::scale(sum, clip_of(thread / kSharing));
        four_at(to.d2[at]) = sum;
      });
    const Slice slice = last_slice(slot);
    store_state<kOfW2>(s.hq, s.d_out, last, slice, s.of_w, to.tile_weights.last);
    store_state<kOfW2>(s.hq, s.d_out, last, slice, s.of_s, to.tile_trace.last);
    store_state<kOfW2>(s.hq, s.d_out, last, slice, s.of_init, to.tile_init.last);
  }

  // ⟨q, dzq W1ᵀ⟩ and those of S1 and W1_init, of this thread's numbers: dzq is not rounded here.
  MAL_DEVICE void dot_hidden(const float (&d_hidden)[kNarrow][4]) {
    each_state(first_states(), [&](Dot dot, const First& w, const float*) {
      float product[kNarrow][4] = {};
      multiply<kD, false>(product, s.q, narrow.row, w, narrow.column);
      each_narrow([&](int n, int i, int, int) {
        dots[dot][i / 2] += d_hidden[n][i] * product[n][i];
      });
    });
  }

  // dδ1, dk and dq, from dzq.
  MAL_DEVICE void through_first(const float (&d_hidden)[kNarrow][4]) {
    set_first();
    cluster_sync();  // dz and the states; the parts of dδ2 have been read
    locate();
    if (steps) {
      dot_hidden(d_hidden);
      through_scores<kD, kHidden>(s.q, s.k[0], dz, s.d1);
      block_sync();  // the scores
      locate();
    }
    float d[kWide][4] = {};
    through_states<kHidden>(d, wide, dz, first_states(), [](Dot, int, int, int, float) {});
    if (steps) {
      multiply<kTokens, false>(d, scores.gradient, wide.row, s.k[0], wide.column);
      store_units(to.d1, scores.value, dz, true);
      float part[kWide][4] = {};
      multiply_transposed(part, scores.gradient, s.q, wide);
      store_part(part, 0);
    }
    block_sync();  // the states have been read
    locate();
    store_part(d, 1);
    const Slice slice = first_slice(slot);
    store_state<kOfW1>(s.q, dz, first, slice, s.of_w, to.tile_weights.first);
    store_state<kOfW1>(s.q, dz, first, slice, s.of_s, to.tile_trace.first);
    store_state<kOfW1>(s.q, dz, first, slice, s.of_init, to.tile_init.first);
    cluster_sync();  // dk and dq, of every block
    locate();
    each_sum(1, [&](int64_t at, Vector<float, 4> sum) {
      const auto dy = four_at(dy_at(at));
#pragma unroll
      for (int j = 0; j < 4; j++) four_at(query_at(at)).at[j] = query(dy.at[j], sum.at[j]);
    });
    if (steps) each_sum(0, [&](int64_t at, Vector<float, 4> sum) { four_at(to.k[at]) = sum; });
  }

  // --- coefficients ----------------------------------------------------------------------------

  MAL_DEVICE float dot_of(Dot dot, int t) const {
    float sum = has_gain() && !rank ? s.gain_dots[dot][t] : 0;
#pragma unroll
    for (int i = 0; i < kWarps / kTile; i++) sum += s.sums[i][dot][t];
    return sum;
  }

  // The gradient of `columns`, but for θ.
  MAL_DEVICE void store_columns(Columns& d) const {
    Base::template each_of<kScores>(
        square, [&](int n, int i, int t, int of) { d[t][of] = dc[n][i]; });
    if (thread >= kTokens) return;
    d[thread][kOfState] = dot_of(kOnTrace, thread);
    d[thread][kOfBeta] = dot_of(kOnWeights, thread) - dot_of(kOnInit, thread);
  }

  // Walks up this thread's column, then down: `columns` and `d` become what the gradients of decay
  // and momentum are the sums of.
  MAL_DEVICE void walk_column(Columns& d) const {
    const int of = thread;
    const bool is_token = of < kTokens;
    const float rate = is_token ? -s.lr[of] : 1;
    float d_w = 0, d_e = 0, d_rate = 0;
#pragma unroll 1
    for (int t = kTokens - 1; t >= 0; t--) {
      float before = t ? s.columns[t - 1][of] : of == kOfBeta;
      d_rate += s.columns[t][of] * d[t][of];
      d_w += rate * d[t][of], d_e += d_w;
      s.columns[t][of] = d_w * before, d[t][of] = d_e;
      d_w *= 1 - s.decay[t], d_e *= s.momentum[t];
    }
    float e = of == kOfState;
#pragma unroll 1
    for (int t = 0; t < kTokens; t++) {
      d[t][of] *= e;
      e = s.momentum[t] * e + (t == of);
    }
    if (is_token) s.d_rate[of] = -d_rate / clip_of(of);
  }

  MAL_DEVICE void sum_columns(const Columns& d) const {
    const int t = thread / kSharing;
    float of_decay = 0, of_momentum = 0;
#pragma unroll 1
    for (int of = thread % kSharing; of < kColumns; of += kSharing)
      of_decay -= s.columns[t][of], of_momentum += d[t][of];
    of_decay = over_sharing(of_decay), of_momentum = over_sharing(of_momentum);
    if (thread % kSharing == 0) s.d_decay[t] = of_decay, s.d_momentum[t] = of_momentum;
  }

  // The gradients of ρ, momentum and decay; each block has those of its hidden units.
  MAL_DEVICE void coefficient_gradients() const {
    Columns& d = in_place_of<Columns>(s.part[0]);
    store_sums(dots);
    cluster_sync();  // the sums of the warps; all parts have been read
    store_columns(d);
    block_sync();  // dc
    if (thread < kColumns) walk_column(d);
    block_sync();  // what the columns give
    sum_columns(d);
    cluster_sync();  // the sums of every block
    if (rank || thread >= tile.count) return;
    const int64_t at = token_at(thread);
    to.rate[at] = over_blocks(&s.d_rate[thread]);
    if (to.momentum) to.momentum[at] = over_blocks(&s.d_momentum[thread]);
    if (to.decay) to.decay[at] = over_blocks(&s.d_decay[thread]);
  }

  // --- a tile ----------------------------------------------------------------------------------

  MAL_DEVICE void run() {
    load_tile();
    block_sync();  // all of this tile is there
    locate();
    if (steps)
      find_write();
    else
      every_coefficient();
    block_sync();  // the factors and coefficients; the anchor has been read
    locate();
    if (is_deep()) {
      set_first();
      block_sync();  // the states
      locate();
    }
    read_hidden();
    block_sync();  // hq; the states have been read
    locate();
    set_last();
    block_sync();  // the states
    locate();
    if (has_gain()) gain_gradients();
    float d_hidden[kNarrow][4] = {};
    through_last(d_hidden);
    if (is_deep()) through_first(d_hidden);
    if (steps) coefficient_gradients();
    cluster_sync();  // no block goes on while another reads its shared memory
  }
};

// The row of a tile: the last one whose first tile is not behind it.
MAL_DEVICE int row_of(int64_t slot, const mal_causal_read_bwd_args& a) {
  int row = 0;
  for (int behind = a.call.rows; behind - row > 1;) {
    int middle = (row + behind) / 2;
    if (a.first_tile[middle] <= slot)
      row = middle;
    else
      behind = middle;
  }
  return row;
}

MAL_DEVICE bool exists(int64_t slot, int row, const mal_causal_read_bwd_args& a) {
  const int64_t* bounds = a.call.cu_seqlens;
  int length = bounds ? bounds[row + 1] - bounds[row] : a.call.T;
  int start = a.call.position ? a.call.position[row] : 0;
  return slot - a.first_tile[row] < tiles_of_row(length, start, a.call.chunk_size);
}

template <class T, int kD>
MAL_KERNEL(kThreads, 1) causal_read_bwd(mal_causal_read_bwd_args a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // never launched on a GPU without clusters
  for (int64_t slot = blockIdx.z; slot < a.tiles; slot += gridDim.z) {
    int row = row_of(slot, a);
    if (exists(slot, row, a)) ReadBackward<T, kD>(a, slot, row).run();
  }
#endif
}

}  // namespace
}  // namespace mal::memory

MAL_API int mal_causal_read_bwd(const mal_causal_read_bwd_args* a) {
  using namespace mal::memory;
  const int64_t tiles = a->tiles < 65535 ? a->tiles : 65535;  // as many as a grid may have
  return for_type_of(a->call, [&]<class T, int kD>() {
    return launch_clusters<Shared<T, kD>>(causal_read_bwd<T, kD>, a->call, tiles, a->stream,
                                          *a);
  });
}
