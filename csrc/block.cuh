// A thread block at work on a memory of one or two layers: it holds some hidden units, walks tiles of
// tokens and computes the factors of a tile's gradient.
//
//     z = K W1, h = act(z), e = h W2 - V, δ2 = 2 e (through LayerNorm), δ1 = (δ2 W2ᵀ) ⊙ act'(z)
//
// with W the anchor. Columns and tokens that do not exist are zeros throughout: each activation
// keeps them so.
#pragma once
#include "activation.cuh"
#include "device.cuh"
#include "mma.cuh"
#include "neural_memory.h"
#include "tile.cuh"

namespace mal::memory {

constexpr float kLayerNormEpsilon = 1e-5f;

template <class T, int kD>
struct Factors {
  using Number = T;
  static constexpr int kFeatures = kD, kHidden = units_for(kD);
  Tile<T, kTokens, kD> k[2];
  Tile<T, kTokens, kD> v[2];
  Tile<T, kD, kHidden> w1;  // the anchor
  Tile<T, kHidden, kD> w2;
  Tile<T, kTokens, kHidden> h;
  Tile<T, kTokens, kHidden> d1;
  Tile<T, kTokens, kD> d2;
  // z, then act'(z), each number its thread's own; and in its place a matrix
  alignas(1024) float slope[kTokens][kHidden + kPad];
  // this block's part of h W2, in turns: one may be read by another block while the next is written
  float part[2][kTokens][kD + 4];
  float hidden_norm[2][kTokens];  // likewise ‖h‖²
  float d1_norm[2][kTokens];      // and ‖δ1‖²
  float norm[kTokens];            // what all but the first layer gives to ‖g‖²
  float k_norm[kTokens];          // ‖k‖²
  float lr[kTokens], momentum[kTokens], decay[kTokens];
  float on_w[kTokens], on_s[kTokens];  // what X is multiplied with
  float clip[kTokens];                 // and δ, where gradients are clipped
  // after the tile's last token; nvcc loads 16 bytes for the three, which nobody else may write
  alignas(16) float beta;
  float f, epsilon, unused;
  float gain[3][kD];                   // γ: of W, of S, of the anchor
};

// Two 16-bit numbers times one factor each, rounded once.
template <class T>
MAL_DEVICE uint32_t scaled(uint32_t pair, float low, float high) {
  union {
    uint32_t bits;
    T at[2];
  } x;
  x.bits = pair;
  x.at[0] = from_float<T>(to_float(x.at[0]) * low);
  x.at[1] = from_float<T>(to_float(x.at[1]) * high);
  return x.bits;
}

// A block at work on one head of a row. `Shared` is its shared memory, like Factors; a kernel that
// does not call all of this needs only the fields that are named in what it calls.
template <class Shared>
struct Tiles {
  using T = typename Shared::Number;
  static constexpr int kD = Shared::kFeatures, kHidden = Shared::kHidden;
  using Tokens = Tile<T, kTokens, kD>;      // what a tile has by features
  using Units = Tile<T, kTokens, kHidden>;  // and by this block's hidden units
  // groups of warps along the rows of a tile, W1 and W2, and the 8-column parts of each warp of
  // what a tile has by features and by hidden units, and of W1 and W2
  static constexpr int kTile = kTokens / 16, kFirst = kD / 16, kLast = kHidden / 16;
  static constexpr int kWide = kD * kTile / kWarps / 8, kNarrow = kHidden * kTile / kWarps / 8;
  static constexpr int kOfW1 = kHidden * kFirst / kWarps / 8, kOfW2 = kD * kLast / kWarps / 8;
  static constexpr int kShare = kD / kSharing;  // features of a token that a thread takes

  const mal_memory_call& a;
  Shared& s = *mal::shared<Shared>();
  int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned rank = cluster_rank();
  const int blocks = gridDim.x;
  int head = blockIdx.y, row;
  const int64_t begin = a.cu_seqlens ? a.cu_seqlens[row] : row * a.T;
  const int length = a.cu_seqlens ? a.cu_seqlens[row + 1] - begin : a.T;
  const int chunk_size = a.chunk_size;
  Place wide = part_of(warp, kTile, 8 * kWide);
  Place narrow = part_of(warp, kTile, 8 * kNarrow);
  Place first = part_of(warp, kFirst, 8 * kOfW1);
  Place last = part_of(warp, kLast, 8 * kOfW2);

  // this thread's numbers of two states, such as W and S, by layer
  float w1[kOfW1][4], s1[kOfW1][4], w2[kOfW2][4], s2[kOfW2][4];

  MAL_DEVICE explicit Tiles(const mal_memory_call& call, int row = blockIdx.z)
      : a(call), row(row) {}

  // Finds this thread's place anew. What follows from it, such as addresses, is then computed again
  // where it is needed, not held in registers from the start.
  MAL_DEVICE void locate() {
    reread(threadIdx.x, thread), reread(blockIdx.y, head), reread(blockIdx.z, row);
    lane = thread % 32, warp = thread / 32;
    wide = part_of(warp, kTile, 8 * kWide), narrow = part_of(warp, kTile, 8 * kNarrow);
    first = part_of(warp, kFirst, 8 * kOfW1), last = part_of(warp, kLast, 8 * kOfW2);
  }

  // --- the state -------------------------------------------------------------------------------

  // Where the numbers of a layer that this thread holds stand in global memory.
  struct Slice {
    int64_t at;         // the first of them
    int rows, columns;  // from there to the layer's end
    int pitch;

    // Calls `each` with every number's place in its fragments and in memory, -1 beyond the end.
    template <int kCount, class Each>
    MAL_DEVICE void each(const float (&)[kCount][4], Each each) const {
#pragma unroll
      for (int n = 0; n < kCount; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          bool exists = 8 * (i / 2) < rows && 8 * n + i % 2 < columns;
          each(n, i, exists ? at + 8 * (i / 2) * pitch + 8 * n + i % 2 : -1);
        }
    }
  };

  MAL_DEVICE Slice slice_of(int64_t slot, Place part, int rows, int columns, int above,
                            int left) const {
    Place p = accumulator_of(lane, 0);
    int row_in_all = above + part.row + p.row, column = left + part.column + p.column;
    int64_t at = ((slot * a.H + head) * rows + row_in_all) * columns + column;
    return {at, rows - row_in_all, columns - column, columns};
  }

  // Of the state in `slot`: of a row, unless states are kept more often.
  MAL_DEVICE Slice first_slice(int64_t slot) const {
    return slice_of(slot, first, a.D, a.E, 0, rank * kHidden);
  }
  MAL_DEVICE Slice last_slice(int64_t slot) const {
    return slice_of(slot, last, a.E, a.D, rank * kHidden, 0);
  }
  MAL_DEVICE int64_t gain_at(int feature, int64_t slot) const {
    return (slot * a.H + head) * a.D + feature;
  }
  MAL_DEVICE bool is_deep() const { return a.weights.first; }
  MAL_DEVICE bool has_gain() const { return a.weights.gain; }
  MAL_DEVICE bool clips() const { return a.max_grad_norm != 0; }

  template <int kCount>
  MAL_DEVICE void load_layer(float (&w)[kCount][4], const Slice& slice, const float* from) const {
    slice.each(w, [&](int n, int i, int64_t at) { w[n][i] = from && at >= 0 ? from[at] : 0; });
  }

  template <int kCount>
  MAL_DEVICE void store_layer(const float (&w)[kCount][4], const Slice& slice, float* to) const {
    slice.each(w, [&](int n, int i, int64_t at) {
      if (to && at >= 0) to[at] = w[n][i];
    });
  }

  // The state that the block holds, of W and S or whatever takes their place: γ in `s.gain`.
  MAL_DEVICE void load_state(const mal_state& weights, const mal_state& trace, int64_t slot) {
    load_layer(w1, first_slice(slot), weights.first);
    load_layer(s1, first_slice(slot), trace.first);
    load_layer(w2, last_slice(slot), weights.last);
    load_layer(s2, last_slice(slot), trace.last);
    if (thread >= kD) return;
    bool exists = has_gain() && thread < a.D;
    s.gain[0][thread] = exists ? weights.gain[gain_at(thread, slot)] : 0;
    s.gain[1][thread] = exists ? trace.gain[gain_at(thread, slot)] : 0;
  }

  MAL_DEVICE void store_weights(const mal_state& to, int64_t slot) const {
    store_layer(w1, first_slice(slot), to.first);
    store_layer(w2, last_slice(slot), to.last);
    store_gain(s.gain[0], to, slot);
  }

  MAL_DEVICE void store_trace(const mal_state& to, int64_t slot) const {
    store_layer(s1, first_slice(slot), to.first);
    store_layer(s2, last_slice(slot), to.last);
    store_gain(s.gain[1], to, slot);
  }

  MAL_DEVICE void store_gain(const float* gain, const mal_state& to, int64_t slot) const {
    if (has_gain() && !rank && thread < a.D) to.gain[gain_at(thread, slot)] = gain[thread];
  }

  // What the products read becomes `w`, or what the caller gives instead.
  template <int kCount, class Matrix>
  MAL_DEVICE void set_layer(Matrix& tile, const float (&w)[kCount][4], Place part,
                            const Slice& slice, const float* given) const {
    slice.each(w, [&](int n, int i, int64_t at) {
      Place p = accumulator_of(lane, i);
      float value = given ? (at >= 0 ? given[at] : 0) : w[n][i];
      tile[part.row + p.row][part.column + 8 * n + p.column] = from_float<T>(value);
    });
  }

  // The anchor is what is held, or what is given instead.
  MAL_DEVICE void set_anchor(const mal_state& given, int64_t slot) {
    if (is_deep()) set_layer(s.w1, w1, first, first_slice(slot), given.first);
    set_layer(s.w2, w2, last, last_slice(slot), given.last);
    if (thread >= kD) return;
    bool outside = given.gain && thread < a.D;
    s.gain[2][thread] = outside ? given.gain[gain_at(thread, slot)] : s.gain[0][thread];
  }

  // --- a tile ----------------------------------------------------------------------------------

  // Starts loading the keys and values of `count` tokens.
  MAL_DEVICE void fetch(int token, int count, int buffer) {
    fetch(s.k[buffer], a.k, token, count);
    fetch(s.v[buffer], a.v, token, count);
    copy_commit();
  }

  MAL_DEVICE void fetch(Tokens& tile, const void* from, int token, int count) const {
#pragma unroll 1
    for (int i = 0; i < kTokens * kD / 8 / kThreads; i++) {
      Place p = copy_of(thread, i, kD);
      bool exists = p.row < count && p.column < a.D;
      int64_t at = exists ? ((begin + token + p.row) * a.H + head) * a.D + p.column : 0;
      copy_async(&tile[p.row][p.column], static_cast<const T*>(from) + at, exists);
    }
  }

  // The gates of the tile's tokens; with chunk steps those of the chunk stand first.
  MAL_DEVICE void load_gates(int token, int count, int chunk) {
    if (thread >= kTokens) return;
    bool exists = thread < count;
    int64_t at = (begin + token + thread) * a.H + head;
    s.lr[thread] = exists ? a.lr[at] : 0;
    if (!a.token_steps)
      at = ((a.cu_seqlens ? a.first_gate[row] : row * a.chunk_gates) + chunk) * a.H + head;
    s.momentum[thread] = exists && a.momentum ? a.momentum[at] : 0;
    s.decay[thread] = exists && a.decay ? a.decay[at] : 0;
  }

  // β, f, ε after the tile, and the coefficients of its tokens but for θ.
  MAL_DEVICE void coefficients(int count, bool opens) {
    coefficients(count, opens, [](int, float, float, float) {});
  }

  // Thread s walks down column s of w and E, thread kTokens that of the state before the tile:
  // e ← η e + [t = s], w ← (1 - α) w + e. With token steps `each` is given t and w, e, β there.
  template <class Each>
  MAL_DEVICE void coefficients(int count, bool opens, Each each) {
    if (thread > kTokens) return;
    const bool is_token = thread < kTokens;
    float w = 0, e = !is_token, beta = 1;
    if (a.token_steps) {
      for (int t = 0; t < count; t++) {
        float kept = 1 - s.decay[t];
        e = s.momentum[t] * e + (t == thread);
        w = kept * w + e;
        beta *= kept;
        each(t, w, e, beta);
      }
    } else if (is_token) {
      w = e = thread < count;
    } else if (opens) {
      w = e = s.momentum[0], beta = 1 - s.decay[0];
    }
    if (is_token)
      s.on_w[thread] = w, s.on_s[thread] = e;
    else
      s.f = w, s.epsilon = e, s.beta = beta;
  }

  // Calls `each` with the row and column of every number of a product whose `kCount` parts of 8
  // columns, from `part` on, are this warp's.
  template <int kCount, class Each>
  MAL_DEVICE void each_of(Place part, Each each) const {
#pragma unroll
    for (int n = 0; n < kCount; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        Place p = accumulator_of(lane, i);
        each(n, i, part.row + p.row, part.column + 8 * n + p.column);
      }
  }

  // That of a tile of hidden units, and of one of features.
  template <class Each>
  MAL_DEVICE void each_narrow(Each each) const {
    each_of<kNarrow>(narrow, each);
  }
  template <class Each>
  MAL_DEVICE void each_wide(Each each) const {
    each_of<kWide>(wide, each);
  }

  // h = act(K W1), and act'(K W1)
  MAL_DEVICE void hidden(int buffer) {
    hidden(buffer, [](int, int, float) {});
  }

  // Moreover calls `also` with the token, unit and z of every number that this thread computes.
  template <class Also>
  MAL_DEVICE void hidden(int buffer, Also also) {
    if (!is_deep()) return take_units(s.k[buffer], s.h);
    float z[kNarrow][4] = {};
    multiply<kD, false>(z, s.k[buffer], narrow.row, s.w1, narrow.column);
    activate_all(z, s.h, also);
  }

  // What the last layer is given where it is the only one: features as hidden units.
  MAL_DEVICE void take_units(const Tokens& x, Units& to) const {
    each_narrow([&](int, int, int token, int unit) {
      int feature = rank * kHidden + unit;
      to[token][unit] = feature < kD ? x[token][feature] : from_float<T>(0);
    });
  }

  // act(z), and act'(z) into `slope`.
  template <class Also>
  MAL_DEVICE void activate_all(const float (&z)[kNarrow][4], Units& to, Also also) {
    each_narrow([&](int n, int i, int token, int unit) { s.slope[token][unit] = z[n][i]; });
#pragma unroll 1  // one copy of the code of all activations
    for (int j = 0; j < 4 * kNarrow; j++) {
      Place p = accumulator_of(lane, j % 4);
      int token = narrow.row + p.row, unit = narrow.column + j / 4 * 8 + p.column;
      float z = s.slope[token][unit], h;
      activate(a.activation, z, h, s.slope[token][unit]);
      to[token][unit] = from_float<T>(h);
      also(token, unit, z);
    }
  }

  // This block's part of h W2, and of ‖h‖².
  MAL_DEVICE void project(int turn) {
    float o[kWide][4] = {};
    multiply<kHidden, false>(o, s.h, wide.row, s.w2, wide.column);
    store_part(o, turn);
    if (clips()) square_rows(s.h, s.hidden_norm[turn]);
  }

  MAL_DEVICE void store_part(const float (&o)[kWide][4], int turn) {
    each_wide([&](int n, int i, int token, int feature) {
      s.part[turn][token][feature] = o[n][i];
    });
  }

  // ‖·‖² of the rows of a tile of hidden units.
  MAL_DEVICE void square_rows(const Units& tile, float* to) const {
    float sum = 0;
    int token = thread / kSharing, share = thread % kSharing;
    for (int unit = share; unit < kHidden; unit += kSharing) {
      float x = to_float(tile[token][unit]);
      sum += x * x;
    }
    sum = over_sharing(sum);
    if (share == 0) to[token] = sum;
  }

  // What this warp has of each token into `s.sums`; given are each thread's parts, for its two rows.
  template <int kSums>
  MAL_DEVICE void store_sums(const float (&sums)[kSums][2]) const {
#pragma unroll
    for (int j = 0; j < kSums; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float sum = sums[j][i];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        int token = narrow.row + accumulator_of(lane, 2 * i).row;
        if (lane % 4 == 0) s.sums[warp / kTile][j][token] = sum;
      }
  }

  // Σ over the threads that share a token.
  MAL_DEVICE float over_sharing(float x) const {
#pragma unroll
    for (int mask = kSharing / 2; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
    return x;
  }

  // Σ over the cluster's blocks of `from` in their shared memory.
  MAL_DEVICE float over_blocks(float* from) const {
    float sum = 0;
    for (int r = 0; r < blocks; r++) sum += *map_shared(from, r);
    return sum;
  }

  // Likewise of four numbers.
  MAL_DEVICE Vector<float, 4> four_over_blocks(float* from) const {
    Vector<float, 4> sum = {};
    for (int r = 0; r < blocks; r++) {
      auto four = four_at(*map_shared(from, r));
#pragma unroll
      for (int j = 0; j < 4; j++) sum.at[j] += four.at[j];
    }
    return sum;
  }

  // The column of number `i` of those of its token that this thread takes in error().
  MAL_DEVICE int feature_of(int i) const { return share_of(thread, i).column; }

  // M(k) - v there, from what the network gave, through LayerNorm or not.
  MAL_DEVICE float error_of(float o, int feature, int buffer) const {
    int token = thread / kSharing;
    if (has_gain()) o = to_float(s.k[buffer][token][feature]) + (1 + s.gain[2][feature]) * o;
    return o - to_float(s.v[buffer][token][feature]);
  }

  // Sums h W2 over the blocks; from it the surprise, δ2 and, with LayerNorm, the factors of γ. The
  // numbers on the way, each its thread's own, take the place of the last tile's part.
  MAL_DEVICE void error(int token, int count, int buffer, int turn, float* surprises) {
    const int t = thread / kSharing;
    float* o = s.part[1 - turn][t];
    float mean = over_sharing(sum_parts(o, turn)) / a.D, rstd = 1;
    if (has_gain()) rstd = normalise(o, mean);
    float surprise = 0, of_d = 0, projected = 0;  // the latter two for LayerNorm's gradient
#pragma unroll 4
    for (int i = 0; i < kShare; i++) {
      int feature = feature_of(i);
      float e = error_of(o[feature], feature, buffer), d = 2 * e * (1 + s.gain[2][feature]);
      surprise += e * e;
      of_d += d, projected += d * o[feature];
    }
    surprise = over_sharing(surprise);
    if (surprises && rank == 0 && thread % kSharing == 0 && t < count)
      surprises[(begin + token + t) * a.H + head] = surprise;
    store_factors(o, rstd, over_sharing(of_d) / a.D, over_sharing(projected) / a.D, buffer, turn);
  }

  // h W2 of this thread's features into `o`, and the sum of what it is there.
  MAL_DEVICE float sum_parts(float* o, int turn) {
    float total = 0;
#pragma unroll 2
    for (int i = 0; i < kShare; i += 4) {
      auto sum = four_over_blocks(&s.part[turn][thread / kSharing][feature_of(i)]);
      four_at(o[feature_of(i)]) = sum;
      total += sum.at[0] + sum.at[1] + sum.at[2] + sum.at[3];
    }
    return total;  // columns beyond D are zero
  }

  // LayerNorm without its gain; 1 / the standard deviation.
  MAL_DEVICE float normalise(float* o, float mean) const {
    float variance = 0;
#pragma unroll 4
    for (int i = 0; i < kShare; i++) {
      float centred = feature_of(i) < a.D ? o[feature_of(i)] - mean : 0;
      variance += centred * centred;
    }
    float rstd = rsqrtf(over_sharing(variance) / a.D + kLayerNormEpsilon);
#pragma unroll 4
    for (int i = 0; i < kShare; i++) {
      float& x = o[feature_of(i)];
      x = feature_of(i) < a.D ? (x - mean) * rstd : 0;
    }
    return rstd;
  }

  MAL_DEVICE void store_factors(float* o, float rstd, float mean, float projected, int buffer,
                                int turn) {
    const int t = thread / kSharing;
    float of_d2 = 0, of_gain = 0, of_k = 0;  // ‖·‖²
#pragma unroll 4
    for (int i = 0; i < kShare; i++) {
      int feature = feature_of(i);
      float d = 2 * error_of(o[feature], feature, buffer), k = to_float(s.k[buffer][t][feature]);
      if (has_gain()) {
        float normed = o[feature];
        o[feature] = d * normed;
        of_gain += o[feature] * o[feature];
        d = rstd * (d * (1 + s.gain[2][feature]) - mean - normed * projected);
        if (feature >= a.D) d = 0;
      }
      s.d2[t][feature] = from_float<T>(d);
      of_d2 += d * d, of_k += k * k;
    }
    if (!clips()) return;
    of_d2 = over_sharing(of_d2), of_gain = over_sharing(of_gain), of_k = over_sharing(of_k);
    if (thread % kSharing) return;
    s.norm[t] = of_d2 * over_blocks(&s.hidden_norm[turn][t]) + of_gain;
    s.k_norm[t] = of_k;
  }

  // δ1 = (δ2 W2ᵀ) ⊙ act'(z)
  MAL_DEVICE void hidden_delta() {
    if (!is_deep()) return;
    float d[kNarrow][4] = {};
    multiply<kD, true>(d, s.d2, narrow.row, s.w2, narrow.column);
    each_narrow([&](int n, int i, int token, int unit) {
      s.d1[token][unit] = from_float<T>(d[n][i] * s.slope[token][unit]);
    });
  }

  // ‖δ1‖² of every block, if gradients are clipped; the cluster is waited for then or if `waits`.
  MAL_DEVICE void exchange_norms(int turn, bool waits) {
    bool clips_first = clips() && is_deep();
    if (clips_first) {
      block_sync();  // δ1 is there
      square_rows(s.d1, s.d1_norm[turn]);
    }
    if (clips_first || waits) cluster_sync();
  }

  // θ into the coefficients, and how much each token's gradient is clipped.
  MAL_DEVICE void scale_coefficients(int turn) {
    if (thread >= kTokens) return;
    s.on_w[thread] *= -s.lr[thread];
    s.on_s[thread] *= -s.lr[thread];
    if (!clips()) return;
    float most = static_cast<float>(a.max_grad_norm), norm = s.norm[thread];
    if (is_deep()) norm += s.k_norm[thread] * over_blocks(&s.d1_norm[turn][thread]);
    s.clip[thread] = most * rsqrtf(max(norm, most * most));
  }

  // Clips δ1, δ2 and the factors of γ. Not X or its coefficients: they would leave float16's range.
  MAL_DEVICE void clip(int turn) {
    const int t = thread / kSharing;
    if (is_deep()) scale_row<kHidden>(s.d1[t], s.clip[t]);
    scale_row<kD>(s.d2[t], s.clip[t]);
    if (has_gain()) scale_row<kD>(s.part[1 - turn][t], s.clip[t]);
  }

  template <int kWidth, class Row>
  MAL_DEVICE void scale_row(Row&& x, float factor) const {
#pragma unroll 2
    for (int i = 0; i < kWidth / kSharing; i += 4) {
      scale(four_at(x[feature_of(i)]), factor);
    }
  }

  template <class Number>
  MAL_DEVICE static void scale(Vector<Number, 4>& four, float factor) {
#pragma unroll
    for (int j = 0; j < 4; j++) four.at[j] = from_float<Number>(to_float(four.at[j]) * factor);
  }

  // Starts w += (on_w ⊙ x)ᵀ d and trace += (on_s ⊙ x)ᵀ d, over the tile's tokens.
  template <int kCount, class X, class D>
  MAL_DEVICE void add_gradients(float (&w)[kCount][4], float (&trace)[kCount][4], const X& x,
                                const D& d, Place part) {
    if constexpr (kTakesColumns<X>) {
      wgmma_fence(w, trace);
#pragma unroll
      for (int t = 0; t < kTokens; t += 16) {
        uint32_t of_w[4], of_s[4];
        scaled_factors(of_w, of_s, x, t, part.row);
        wgmma_fence();  // the factors
        wgmma<kMajorMN>(w, of_w, d.descriptor(t, part.column), T());
        wgmma<kMajorMN>(trace, of_s, d.descriptor(t, part.column), T());
        wgmma_commit();
      }
    } else {
#pragma unroll 1
      for (int t = 0; t < kTokens; t += 16) {
        uint32_t of_w[4], of_s[4];
        scaled_factors(of_w, of_s, x, t, part.row);
#pragma unroll
        for (int n = 0; n < kCount; n += 2) {
          uint32_t fd[4];
          load(fd, d, t, part.column + 8 * n, true, true);
          mma(w[n], of_w, {fd[0], fd[1]}, T());
          mma(w[n + 1], of_w, {fd[2], fd[3]}, T());
          mma(trace[n], of_s, {fd[0], fd[1]}, T());
          mma(trace[n + 1], of_s, {fd[2], fd[3]}, T());
        }
      }
    }
  }

  // This warp's fragments of (on_w ⊙ x)ᵀ and (on_s ⊙ x)ᵀ, of 16 tokens from t on.
  template <class X>
  MAL_DEVICE void scaled_factors(uint32_t (&of_w)[4], uint32_t (&of_s)[4], const X& x, int t,
                                 int row) const {
    uint32_t fx[4];
    load(fx, x, t, row, false, true);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int token = t + 8 * (i / 2) + 2 * (lane % 4);
      of_w[i] = scaled<T>(fx[i], s.on_w[token], s.on_w[token + 1]);
      of_s[i] = scaled<T>(fx[i], s.on_s[token], s.on_s[token + 1]);
    }
  }
};

// Launches `count` clusters for each head, with `Shared` for each of their blocks.
template <class Shared, class Arguments>
int launch_clusters(void (*kernel)(Arguments), const mal_memory_call& call, int64_t count,
                    void* stream, const Arguments& arguments) {
  static_assert(sizeof(Shared) <= 227 * 1024, "more than a block may have on Hopper");
  unsigned blocks = blocks_for(call.E, Shared::kHidden);
  if (!blocks) return kInvalidArgument;
  dim3 grid = {blocks, static_cast<unsigned>(call.H), static_cast<unsigned>(count)};
  return launch(kernel, grid, {kThreads, 1, 1}, sizeof(Shared), blocks, stream, arguments);
}

// Calls `start` with the type of the call's tokens and the features that its kernel is made for.
template <class Start>
int for_type_of(const mal_memory_call& call, Start start) {
  if (call.D % 8 || call.D > 128) return kInvalidArgument;
  bool is_narrow = call.D <= 64;
  if (call.dtype == MAL_FLOAT16)
    return is_narrow ? start.template operator()<fp16, 64>()
                     : start.template operator()<fp16, 128>();
  if (call.dtype == MAL_BFLOAT16)
    return is_narrow ? start.template operator()<bf16, 64>()
                     : start.template operator()<bf16, 128>();
  return kInvalidArgument;
}

}  // namespace mal::memory
