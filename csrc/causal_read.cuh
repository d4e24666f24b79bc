// The causal read of a tile: what its tokens find in the memory.
//
// With chunk steps they read M(q) at the anchor. With token steps
//
//     zq = β ⊙ (Q W1) + f ⊙ (Q S1) + (1 - β) ⊙ (Q W1_init) - [w ⊙ (Q Kᵀ)] δ1        hq = act(zq)
//     y  = the same of hq and W2, with [w ⊙ (hq hᵀ)] δ2
//
// where W and S are those before the tile and β, f, w stand for every token. Each block has its
// hidden units of hq, and the part of y that comes from them.
#pragma once
#include "block.cuh"

namespace mal::memory {

template <class T, int kD>
struct Reading : Factors<T, kD> {
  static constexpr int kHidden = units_for(kD);
  Tile<T, kTokens, kD> q;
  Tile<T, kTokens, kHidden> hq;
  Tile<T, kTokens, kTokens> scores;
  // what W, S and W_init have in the weights of every token
  float of_w[kTokens], of_s[kTokens], of_init[kTokens];
};

// A block that reads; `Shared` is its shared memory, like Reading.
template <class Shared>
struct Read : Tiles<Shared> {
  using Base = Tiles<Shared>;
  using typename Base::Slice, typename Base::T;
  using Base::a, Base::s, Base::thread, Base::lane, Base::warp, Base::rank, Base::blocks;
  using Base::row, Base::head, Base::begin;
  using Base::w1, Base::s1, Base::w2, Base::s2, Base::first, Base::last, Base::wide, Base::narrow;
  using Base::is_deep, Base::has_gain, Base::clips, Base::first_slice, Base::last_slice;
  using Base::set_layer, Base::coefficients, Base::hidden, Base::take_units, Base::activate_all;
  using Base::project, Base::store_part, Base::error, Base::hidden_delta, Base::exchange_norms;
  using Base::scale_coefficients, Base::clip, Base::over_sharing;
  using Base::feature_of, Base::sum_parts, Base::normalise;

  static constexpr int kD = Base::kD, kHidden = Base::kHidden;
  static constexpr int kNarrow = Base::kNarrow, kWide = Base::kWide, kShare = Base::kShare;
  static constexpr int kOfW1 = Base::kOfW1, kOfW2 = Base::kOfW2;
  static constexpr int kScores = kTokens * Base::kTile / kWarps / 8;  // 8-column parts of a warp

  // What this block holds of a layer.
  template <class Matrix_, int kCount>
  struct Layer {
    using Matrix = Matrix_;
    float (&w)[kCount][4];
    float (&trace)[kCount][4];
    Matrix& anchor;
    Place part;
    Slice slice;
    const float* init;
  };
  using First = Layer<Tile<T, kD, kHidden>, kOfW1>;
  using Last = Layer<Tile<T, kHidden, kD>, kOfW2>;

  const bool reads_all = a.q && a.token_steps;  // every token's own weights

  MAL_DEVICE explicit Read(const mal_memory_call& call, int row = blockIdx.z)
      : Base(call, row) {}

  MAL_DEVICE First first_layer() {
    return {w1, s1, s.w1, first, first_slice(row), a.init.first};
  }
  MAL_DEVICE Last last_layer() { return {w2, s2, s.w2, last, last_slice(row), a.init.last}; }

  // --- the factors of the gradients ------------------------------------------------------------

  // h and δ of the tile; δ1 is there for all threads after the next barrier.
  MAL_DEVICE void find_factors(int token, int count, int turn, float* surprises) {
    hidden(turn);
    block_sync();  // h
    project(turn);
    cluster_sync();  // h W2, of every block
    error(token, count, turn, turn, surprises);
    block_sync();  // δ2
    hidden_delta();
  }

  // What the tile's gradients are multiplied with; all that the read and the write need is there.
  MAL_DEVICE void find_coefficients(int count, bool opens, int turn) {
    exchange_norms(turn, a.q);
    if (reads_all)
      every_coefficient(count, opens, turn);
    else
      coefficients(count, opens);
    scale_coefficients(turn);
    if (reads_all && is_deep()) set_read(first_layer(), opens, turn);
    copy_wait<1>();   // all but the next tile
    block_sync();  // δ1, the coefficients and q
    if (!clips()) return;
    clip(turn);
    block_sync();
  }

  // What W, S and W_init have in the weights of token t, and the coefficients w of the gradients
  // there, with θ, in the place of h W2.
  MAL_DEVICE void every_coefficient(int count, bool opens, int turn) {
    const float rate = thread < kTokens ? -s.lr[thread] : 0;
    coefficients(count, opens, [&](int t, float w, float, float beta) {
      if (thread < kTokens)
        s.part[turn][t][thread] = rate * w;
      else
        s.of_w[t] = beta, s.of_s[t] = w, s.of_init[t] = 1 - beta;
    });
  }

  // --- the read --------------------------------------------------------------------------------

  // W and S of a layer, as they are before the tile, to where the products of the read find them.
  template <class AnyLayer>
  MAL_DEVICE void set_read(const AnyLayer& layer, bool opens, int turn) {
    using Matrix = typename AnyLayer::Matrix;
    if (!opens)
      set_layer(in_place_of<Matrix>(s.v[turn]), layer.w, layer.part, layer.slice, nullptr);
    set_layer(in_place_of<Matrix>(s.slope), layer.trace, layer.part, layer.slice, nullptr);
  }

  // sum += x_t W_t of every token t; y and d are the factors of the gradients. Between its first
  // and its last line all threads have met.
  template <int kDepth, class AnyLayer, int kCount, class X, class D>
  MAL_DEVICE void read_layer(float (&sum)[kCount][4], Place part, const AnyLayer& layer,
                             const X& x, const X& y, const D& d, bool opens, int turn) {
    using Matrix = typename AnyLayer::Matrix;
    auto& other = in_place_of<Matrix>(s.v[turn]);
    const Place square = part_of(warp, Base::kTile, 8 * kScores);
    float by_w[kCount][4] = {}, by_s[kCount][4] = {}, scores[kScores][4] = {};
    start_multiply<kDepth, false>(by_w, x, part.row, opens ? layer.anchor : other, part.column);
    start_multiply<kDepth, false>(by_s, x, part.row, in_place_of<Matrix>(s.slope), part.column);
    start_multiply<kDepth, true>(scores, x, square.row, y, square.column);
    finish(by_w, by_s, scores);
    add_scaled(sum, by_w, s.of_w, part);
    add_scaled(sum, by_s, s.of_s, part);
    // w ⊙ (x yᵀ)
    Base::template each_of<kScores>(square, [&](int n, int i, int t, int of) {
      s.scores[t][of] = from_float<T>(s.part[turn][t][of] * scores[n][i]);
    });
    block_sync();  // the scores; W and S have been read
    if (layer.init) {
      set_layer(other, layer.w, layer.part, layer.slice, layer.init);
      block_sync();
      add_product<kDepth>(sum, part, x, other, s.of_init);
    }
    multiply<kTokens, false>(sum, s.scores, part.row, d, part.column);
  }

  // sum += of ⊙ (x w)
  template <int kDepth, int kCount, class X, class Matrix>
  MAL_DEVICE void add_product(float (&sum)[kCount][4], Place part, const X& x, const Matrix& w,
                              const float* of) const {
    float product[kCount][4] = {};
    multiply<kDepth, false>(product, x, part.row, w, part.column);
    add_scaled(sum, product, of, part);
  }

  // sum += of ⊙ product
  template <int kCount>
  MAL_DEVICE void add_scaled(float (&sum)[kCount][4], const float (&product)[kCount][4],
                             const float* of, Place part) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float factor = of[part.row + accumulator_of(lane, i).row];
#pragma unroll
      for (int n = 0; n < kCount; n++) sum[n][i] += factor * product[n][i];
    }
  }

  // hq = act(zq), and this block's part of y in the place of the coefficients.
  MAL_DEVICE void read(bool opens, int turn) {
    if (is_deep()) {
      float z[kNarrow][4] = {};
      if (reads_all)
        read_layer<kD>(z, narrow, first_layer(), s.q, s.k[turn], s.d1, opens, turn);
      else
        multiply<kD, false>(z, s.q, narrow.row, s.w1, narrow.column);
      activate_all(z, s.hq, [](int, int, float) {});
    } else {
      take_units(s.q, s.hq);
    }
    block_sync();  // hq
    float y[kWide][4] = {};
    if (reads_all) {
      set_read(last_layer(), opens, turn);
      block_sync();
      read_layer<kHidden>(y, wide, last_layer(), s.hq, s.h, s.d2, opens, turn);
    } else {
      multiply<kHidden, false>(y, s.hq, wide.row, s.w2, wide.column);
    }
    store_part(y, turn);
  }

  // M(q) of the tokens that are this block's to store, from the parts of all blocks.
  MAL_DEVICE void store_output(void* output, int token, int count, int turn) {
    const int t = thread / kSharing;
    if (block_of(t, blocks) != static_cast<int>(rank)) return;
    float* o = s.part[turn][t];
    float mean = over_sharing(sum_parts(o, turn)) / a.D;
    if (has_gain()) normalise(o, mean);
    if (t >= count) return;
    T* out = static_cast<T*>(output) + ((begin + token + t) * a.H + head) * a.D;
#pragma unroll 2
    for (int i = 0; i < kShare && feature_of(i) < a.D; i += 4) {
      const int feature = feature_of(i);
      auto& four = four_at(out[feature]);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float y = o[feature + j];
        if (has_gain())
          y = to_float(s.q[t][feature + j]) + (1 + s.part[1 - turn][t][feature + j]) * y;
        four.at[j] = from_float<T>(y);
      }
    }
  }
};

}  // namespace mal::memory
