// The write of a memory of one or two layers, with W and S on chip from the first token to the last.
//
// A cluster of blocks takes a row's head and walks its tokens in tiles. Each block holds some hidden
// units: its slice of W and S stays in registers, in float32, as the accumulators of the products
// that update it; what these products read, the anchor and a tile's factors, stands in shared memory
// in 16 bits. The hidden units meet once a tile, when the slices of h W2 are summed over distributed
// shared memory (and once more for the norms, if gradients are clipped).
//
//     z = K W1, h = act(z), e = h W2 - V, δ2 = 2 e (through LayerNorm), δ1 = (δ2 W2ᵀ) ⊙ act'(z)
//     W ← β W + f S + (1 - β) W_init - (w ⊙ X)ᵀ δ        S ← ε S - (E ⊙ X)ᵀ δ        per layer
//
// with K, V, ... of the tile's tokens, W in the first line the anchor, and the coefficients of
// mal_kernels/reference.py for the tile's last token. A tile ends where its chunk ends; with chunk
// steps only the first tile of a chunk has momentum and decay. Columns and tokens that do not exist
// are zeros throughout: each activation keeps them so.
#include "memory_update.h"

#include "device.cuh"

namespace mal::memory {
namespace {

constexpr float kLayerNormEpsilon = 1e-5f;

template <class T, int kD>
struct Shared {
  static constexpr int kHidden = units_for(kD);
  T k[2][kTokens][kD + kPad];
  T v[2][kTokens][kD + kPad];
  T w1[kD][kHidden + kPad];  // the anchor
  T w2[kHidden][kD + kPad];
  T h[kTokens][kHidden + kPad];
  T d1[kTokens][kHidden + kPad];
  float slope[kTokens][kHidden + kPad];  // z, then act'(z); each number its thread's own
  T d2[kTokens][kD + kPad];
  // this block's part of h W2, in turns: one may be read by another block while the next is written
  float part[2][kTokens][kD + 4];
  float hidden_norm[2][kTokens];  // likewise ‖h‖²
  float d1_norm[2][kTokens];      // and ‖δ1‖²
  float norm[kTokens];            // what all but the first layer gives to ‖g‖²
  float k_norm[kTokens];          // ‖k‖²
  float lr[kTokens], momentum[kTokens], decay[kTokens];
  float on_w[kTokens], on_s[kTokens];  // what X is multiplied with
  float clip[kTokens];                 // and δ, where gradients are clipped
  float beta, f, epsilon;              // after the tile's last token
  float gain[3][kD];                   // γ: of W, of S, of the anchor
};

// act(z) and act'(z)
MAL_DEVICE void activate(int64_t activation, const float z, float& value, float& slope) {
  if (activation == 0) {
    float cdf = 0.5f * (1 + erff(z * 0.70710678f));
    value = z * cdf;
    slope = cdf + z * 0.39894228f * expf(-0.5f * z * z);
  } else if (activation == 1) {
    float inner = 0.79788456f * z * (1 + 0.044715f * z * z);
    float t = tanhf(inner);
    value = 0.5f * z * (1 + t);
    slope = 0.5f * (1 + t) + 0.5f * z * (1 - t * t) * 0.79788456f * (1 + 0.134145f * z * z);
  } else if (activation == 2) {
    float s = 1 / (1 + expf(-z));
    value = z * s;
    slope = s * (1 + z * (1 - s));
  } else {
    value = z > 0 ? z : 0;
    slope = z > 0 ? 1 : 0;
  }
}

// Fragments of operands in shared memory, with rows of kPitch numbers.
template <class T, int kPitch>
MAL_DEVICE void load(uint32_t (&r)[4], const T (*tile)[kPitch], int row, int column, bool straight,
                     bool transposed) {
  Place p = matrix_row_of(threadIdx.x % 32, straight);
  const T* from = &tile[row + p.row][column + p.column];
  if (transposed)
    load_matrices_transposed(r, from);
  else
    load_matrices(r, from);
}

// sum[16, 8 kCount] += a[row.., :] b[:, column..]; b is stored [k][n], or [n][k] if kTransposed.
template <int kDepth, bool kTransposed, class T, int kCount, int kPitchA, int kPitchB>
MAL_DEVICE void multiply(float (&sum)[kCount][4], const T (*a)[kPitchA], int row,
                         const T (*b)[kPitchB], int column) {
#pragma unroll 2
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t fa[4];
    load(fa, a, row, k, true, false);
#pragma unroll
    for (int n = 0; n < kCount; n += 2) {
      uint32_t fb[4];
      if (kTransposed)
        load(fb, b, column + 8 * n, k, false, false);
      else
        load(fb, b, k, column + 8 * n, true, true);
      mma(sum[n], fa, {fb[0], fb[1]}, T());
      mma(sum[n + 1], fa, {fb[2], fb[3]}, T());
    }
  }
}

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

template <class T, int kD>
struct Memory {
  static constexpr int kHidden = units_for(kD);
  // groups of warps along the rows of a tile, W1 and W2, and the 8-column parts of each warp of
  // what a tile has by features and by hidden units, and of W1 and W2
  static constexpr int kTile = kTokens / 16, kFirst = kD / 16, kLast = kHidden / 16;
  static constexpr int kWide = kD * kTile / kWarps / 8, kNarrow = kHidden * kTile / kWarps / 8;
  static constexpr int kOfW1 = kHidden * kFirst / kWarps / 8, kOfW2 = kD * kLast / kWarps / 8;
  static constexpr int kShare = kD / kSharing;  // features of a token that a thread takes

  const mal_memory_update_args& a;
  Shared<T, kD>& s = *mal::shared<Shared<T, kD>>();
  const int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned rank = cluster_rank();
  const int blocks = gridDim.x, head = blockIdx.y, row = blockIdx.z;
  const int64_t begin = a.cu_seqlens ? a.cu_seqlens[row] : row * a.T;
  const int length = a.cu_seqlens ? a.cu_seqlens[row + 1] - begin : a.T;
  const int chunk_size = a.chunk_size;
  const Place wide = part_of(warp, kTile, 8 * kWide);
  const Place narrow = part_of(warp, kTile, 8 * kNarrow);
  const Place first = part_of(warp, kFirst, 8 * kOfW1);
  const Place last = part_of(warp, kLast, 8 * kOfW2);

  float w1[kOfW1][4], s1[kOfW1][4], w2[kOfW2][4], s2[kOfW2][4];

  MAL_DEVICE explicit Memory(const mal_memory_update_args& arguments) : a(arguments) {}

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

  MAL_DEVICE Slice slice_of(Place part, int rows, int columns, int above, int left) const {
    Place p = accumulator_of(lane, 0);
    int row_in_all = above + part.row + p.row, column = left + part.column + p.column;
    int64_t at = ((row * a.H + head) * rows + row_in_all) * columns + column;
    return {at, rows - row_in_all, columns - column, columns};
  }

  MAL_DEVICE Slice first_slice() const { return slice_of(first, a.D, a.E, 0, rank * kHidden); }
  MAL_DEVICE Slice last_slice() const { return slice_of(last, a.E, a.D, rank * kHidden, 0); }
  MAL_DEVICE bool is_deep() const { return a.weights.first; }
  MAL_DEVICE bool has_gain() const { return a.weights.gain; }
  MAL_DEVICE int64_t gain_at(int feature) const { return (row * a.H + head) * a.D + feature; }

  template <int kCount>
  MAL_DEVICE void load_layer(float (&w)[kCount][4], const Slice& slice, const float* from) {
    slice.each(w, [&](int n, int i, int64_t at) { w[n][i] = from && at >= 0 ? from[at] : 0; });
  }

  template <int kCount>
  MAL_DEVICE void store_layer(const float (&w)[kCount][4], const Slice& slice, float* to) const {
    slice.each(w, [&](int n, int i, int64_t at) {
      if (to && at >= 0) to[at] = w[n][i];
    });
  }

  MAL_DEVICE void load_state() {
    load_layer(w1, first_slice(), a.weights.first);
    load_layer(s1, first_slice(), a.trace.first);
    load_layer(w2, last_slice(), a.weights.last);
    load_layer(s2, last_slice(), a.trace.last);
    if (thread >= kD) return;
    bool exists = has_gain() && thread < a.D;
    s.gain[0][thread] = exists ? a.weights.gain[gain_at(thread)] : 0;
    s.gain[1][thread] = exists ? a.trace.gain[gain_at(thread)] : 0;
  }

  MAL_DEVICE void store_state() const {
    store_weights(a.new_weights);
    store_layer(s1, first_slice(), a.new_trace.first);
    store_layer(s2, last_slice(), a.new_trace.last);
    if (has_gain() && !rank && thread < a.D) a.new_trace.gain[gain_at(thread)] = s.gain[1][thread];
  }

  MAL_DEVICE void store_weights(const mal_state& to) const {
    store_layer(w1, first_slice(), to.first);
    store_layer(w2, last_slice(), to.last);
    if (has_gain() && !rank && thread < a.D) to.gain[gain_at(thread)] = s.gain[0][thread];
  }

  // What the products read becomes `w`, or what the caller gives instead.
  template <int kCount, int kPitch>
  MAL_DEVICE void set_layer(T (*tile)[kPitch], const float (&w)[kCount][4], Place part,
                            const Slice& slice, const float* given) const {
    slice.each(w, [&](int n, int i, int64_t at) {
      Place p = accumulator_of(lane, i);
      float value = given ? (at >= 0 ? given[at] : 0) : w[n][i];
      tile[part.row + p.row][part.column + 8 * n + p.column] = from_float<T>(value);
    });
  }

  MAL_DEVICE void set_anchor(const mal_state& given) {
    if (is_deep()) set_layer(s.w1, w1, first, first_slice(), given.first);
    set_layer(s.w2, w2, last, last_slice(), given.last);
    if (thread >= kD) return;
    bool outside = given.gain && thread < a.D;
    s.gain[2][thread] = outside ? given.gain[gain_at(thread)] : s.gain[0][thread];
  }

  // --- a tile ----------------------------------------------------------------------------------

  // Starts loading the keys and values of `count` tokens.
  MAL_DEVICE void fetch(int token, int count, int buffer) {
#pragma unroll 1
    for (int i = 0; i < kTokens * kD / 8 / kThreads; i++) {
      Place p = copy_of(thread, i, kD);
      bool exists = p.row < count && p.column < a.D;
      int64_t from = exists ? ((begin + token + p.row) * a.H + head) * a.D + p.column : 0;
      copy_async(&s.k[buffer][p.row][p.column], static_cast<const T*>(a.k) + from, exists);
      copy_async(&s.v[buffer][p.row][p.column], static_cast<const T*>(a.v) + from, exists);
    }
    copy_commit();
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

  // β, f, ε after the tile, and the coefficients of its tokens but for θ: a scan, by one thread.
  MAL_DEVICE void coefficients(int count, bool opens) {
    if (thread != kThreads - 1) return;
    float beta = 1, f = 0, epsilon = 1;
    if (!a.token_steps) {
      if (opens) beta = 1 - s.decay[0], f = epsilon = s.momentum[0];
      for (int t = 0; t < kTokens; t++) s.on_w[t] = s.on_s[t] = t < count;
    } else {
      for (int t = 0; t < count; t++) {
        beta *= 1 - s.decay[t];
        epsilon *= s.momentum[t];
        f = (1 - s.decay[t]) * f + epsilon;
      }
      float w = 0, e = 1, kept = 1;  // w_Ct, E_Ct and A_Ct
      for (int t = kTokens - 1; t >= 0; t--) {
        if (t >= count) {
          s.on_w[t] = s.on_s[t] = 0;
          continue;
        }
        w += kept;
        s.on_w[t] = w, s.on_s[t] = e;
        w *= s.momentum[t], e *= s.momentum[t], kept *= 1 - s.decay[t];
      }
    }
    s.beta = beta, s.f = f, s.epsilon = epsilon;
  }

  // Calls `each` with every number of a tile of hidden units that this thread computes.
  template <class Each>
  MAL_DEVICE void each_narrow(Each each) const {
#pragma unroll
    for (int n = 0; n < kNarrow; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        Place p = accumulator_of(lane, i);
        each(n, i, narrow.row + p.row, narrow.column + 8 * n + p.column);
      }
  }

  // h = act(K W1), and act'(K W1)
  MAL_DEVICE void hidden(int buffer) {
    if (!is_deep()) {  // the last layer is given K itself
      each_narrow([&](int, int, int token, int unit) {
        int feature = rank * kHidden + unit;
        s.h[token][unit] = feature < kD ? s.k[buffer][token][feature] : from_float<T>(0);
      });
      return;
    }
    float z[kNarrow][4] = {};
    multiply<kD, false>(z, s.k[buffer], narrow.row, s.w1, narrow.column);
    each_narrow([&](int n, int i, int token, int unit) { s.slope[token][unit] = z[n][i]; });
#pragma unroll 1  // one copy of the code of all activations
    for (int j = 0; j < 4 * kNarrow; j++) {
      Place p = accumulator_of(lane, j % 4);
      int token = narrow.row + p.row, unit = narrow.column + j / 4 * 8 + p.column;
      float h;
      float& slope = s.slope[token][unit];
      activate(a.activation, slope, h, slope);
      s.h[token][unit] = from_float<T>(h);
    }
  }

  // This block's part of h W2, and of ‖h‖².
  MAL_DEVICE void project(int turn) {
    float o[kWide][4] = {};
    multiply<kHidden, false>(o, s.h, wide.row, s.w2, wide.column);
#pragma unroll
    for (int n = 0; n < kWide; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        Place p = accumulator_of(lane, i);
        s.part[turn][wide.row + p.row][wide.column + 8 * n + p.column] = o[n][i];
      }
    if (a.max_grad_norm != 0) square_rows(s.h, s.hidden_norm[turn]);
  }

  // ‖·‖² of the rows of a tile of hidden units.
  MAL_DEVICE void square_rows(const T (*tile)[kHidden + kPad], float* to) const {
    float sum = 0;
    int token = thread / kSharing, share = thread % kSharing;
    for (int unit = share; unit < kHidden; unit += kSharing) {
      float x = to_float(tile[token][unit]);
      sum += x * x;
    }
    sum = over_sharing(sum);
    if (share == 0) to[token] = sum;
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
  MAL_DEVICE void error(int token, int count, int buffer, int turn) {
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
    if (rank == 0 && thread % kSharing == 0 && t < count)
      a.surprise[(begin + token + t) * a.H + head] = surprise;
    store_factors(o, rstd, over_sharing(of_d) / a.D, over_sharing(projected) / a.D, buffer, turn);
  }

  // h W2 of this thread's features into `o`, and the sum of what it is there.
  MAL_DEVICE float sum_parts(float* o, int turn) {
    float total = 0;
#pragma unroll 2
    for (int i = 0; i < kShare; i += 4) {
      Vector<float, 4> sum = {};
      for (int r = 0; r < blocks; r++) {
        const float* part = map_shared(s.part[turn][thread / kSharing], r);
        auto four = *reinterpret_cast<const Vector<float, 4>*>(part + feature_of(i));
#pragma unroll
        for (int j = 0; j < 4; j++) sum.at[j] += four.at[j];
      }
      *reinterpret_cast<Vector<float, 4>*>(o + feature_of(i)) = sum;
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
    if (a.max_grad_norm == 0) return;
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

  // θ into the coefficients, and how much each token's gradient is clipped.
  MAL_DEVICE void scale_coefficients(int turn) {
    bool clips = a.max_grad_norm != 0;
    if (clips && is_deep()) {
      __syncthreads();  // δ1 is there
      square_rows(s.d1, s.d1_norm[turn]);
      cluster_sync();
    }
    if (thread >= kTokens) return;
    s.on_w[thread] *= -s.lr[thread];
    s.on_s[thread] *= -s.lr[thread];
    if (!clips) return;
    float most = static_cast<float>(a.max_grad_norm), norm = s.norm[thread];
    if (is_deep()) norm += s.k_norm[thread] * over_blocks(&s.d1_norm[turn][thread]);
    s.clip[thread] = most * rsqrtf(max(norm, most * most));
  }

  // W ← β W + f S + (1 - β) W_init and S ← ε S
  template <int kCount>
  MAL_DEVICE void decay(float (&w)[kCount][4], float (&trace)[kCount][4], const Slice& slice,
                        const float* init) {
    float beta = s.beta, f = s.f, epsilon = s.epsilon;
#pragma unroll
    for (int n = 0; n < kCount; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        w[n][i] = beta * w[n][i] + f * trace[n][i];
        trace[n][i] *= epsilon;
      }
    if (!init || beta == 1) return;
    slice.each(w, [&](int n, int i, int64_t at) {
      if (at >= 0) w[n][i] += (1 - beta) * init[at];
    });
  }

  // w += (on_w ⊙ x)ᵀ d and trace += (on_s ⊙ x)ᵀ d, over the tile's tokens. The clip goes with d:
  // with x it would leave the range of float16.
  template <int kCount, int kPitchX, int kPitchD>
  MAL_DEVICE void add_gradients(float (&w)[kCount][4], float (&trace)[kCount][4],
                                const T (*x)[kPitchX], const T (*d)[kPitchD], Place part) {
    const bool clips = a.max_grad_norm != 0;
#pragma unroll 1
    for (int t = 0; t < kTokens; t += 16) {
      uint32_t fx[4], of_w[4], of_s[4];
      load(fx, x, t, part.row, false, true);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int token = t + 8 * (i / 2) + 2 * (lane % 4);
        of_w[i] = scaled<T>(fx[i], s.on_w[token], s.on_w[token + 1]);
        of_s[i] = scaled<T>(fx[i], s.on_s[token], s.on_s[token + 1]);
      }
#pragma unroll
      for (int n = 0; n < kCount; n += 2) {
        uint32_t fd[4];
        load(fd, d, t, part.column + 8 * n, true, true);
        if (clips) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            int token = t + 8 * (i % 2) + 2 * (lane % 4);
            fd[i] = scaled<T>(fd[i], s.clip[token], s.clip[token + 1]);
          }
        }
        mma(w[n], of_w, {fd[0], fd[1]}, T());
        mma(w[n + 1], of_w, {fd[2], fd[3]}, T());
        mma(trace[n], of_s, {fd[0], fd[1]}, T());
        mma(trace[n + 1], of_s, {fd[2], fd[3]}, T());
      }
    }
  }

  MAL_DEVICE void advance(int buffer, int turn) {
    if (is_deep()) {
      decay(w1, s1, first_slice(), a.init.first);
      add_gradients(w1, s1, s.k[buffer], s.d1, first);
    }
    decay(w2, s2, last_slice(), a.init.last);
    add_gradients(w2, s2, s.h, s.d2, last);
    if (!has_gain() || thread >= a.D) return;
    float& w = s.gain[0][thread];
    float& trace = s.gain[1][thread];
    w = s.beta * w + s.f * trace;
    if (a.init.gain) w += (1 - s.beta) * a.init.gain[gain_at(thread)];
    trace *= s.epsilon;
    for (int t = 0; t < kTokens; t++) {
      float d = s.part[1 - turn][t][thread];
      if (a.max_grad_norm != 0) d *= s.clip[t];
      w += s.on_w[t] * d, trace += s.on_s[t] * d;
    }
  }

  // --- a row -----------------------------------------------------------------------------------

  MAL_DEVICE void walk() {
    int in_chunk = a.position ? a.position[row] : 0, chunk = 0;
    int count = tile_length(0, in_chunk, chunk_size, length);
    if (length > 0) fetch(0, count, 0);
    load_state();
    if (in_chunk) set_anchor(a.anchor);
    int turn = 0;
    for (int token = 0; token < length; turn = 1 - turn) {
      bool opens = in_chunk == 0;
      if (opens) {
        set_anchor({});
        if (a.new_anchor.last && token + chunk_size > length) store_weights(a.new_anchor);
      }
      load_gates(token, count, chunk);
      copy_wait<0>();
      __syncthreads();  // all of this tile is there; the last one is over
      int next = token + count;
      int next_in_chunk = (in_chunk + count) % chunk_size;
      int next_count = tile_length(next, next_in_chunk, chunk_size, length);
      if (next < length) fetch(next, next_count, 1 - turn);
      hidden(turn);
      coefficients(count, opens);
      __syncthreads();  // h
      project(turn);
      cluster_sync();  // h W2, of every block
      error(token, count, turn, turn);
      __syncthreads();  // δ2
      hidden_delta();
      scale_coefficients(turn);
      __syncthreads();  // δ1 and the coefficients
      advance(turn, turn);
      if (next_in_chunk == 0) chunk++;
      token = next, in_chunk = next_in_chunk, count = next_count;
    }
    store_state();
    cluster_sync();  // no block leaves while another reads its shared memory
  }
};

template <class T, int kD>
MAL_KERNEL(kThreads, 1) write(mal_memory_update_args a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // never launched on a GPU without clusters
  Memory<T, kD>(a).walk();
#endif
}

template <class T, int kD>
int start(const mal_memory_update_args& a) {
  static_assert(sizeof(Shared<T, kD>) <= 227 * 1024, "more than a block may have on Hopper");
  unsigned blocks = blocks_for(a.E, units_for(kD));
  if (!blocks) return kInvalidArgument;
  dim3 grid = {blocks, static_cast<unsigned>(a.H), static_cast<unsigned>(a.rows)};
  return launch(write<T, kD>, grid, {kThreads, 1, 1}, sizeof(Shared<T, kD>), blocks, a.stream, a);
}

}  // namespace
}  // namespace mal::memory

MAL_API int mal_memory_update(const mal_memory_update_args* a) {
  using namespace mal::memory;
  if (a->D % 8 || a->D > 128) return mal::kInvalidArgument;
  bool is_narrow = a->D <= 64;
  if (a->dtype == MAL_FLOAT16)
    return is_narrow ? start<mal::fp16, 64>(*a) : start<mal::fp16, 128>(*a);
  if (a->dtype == MAL_BFLOAT16)
    return is_narrow ? start<mal::bf16, 64>(*a) : start<mal::bf16, 128>(*a);
  return mal::kInvalidArgument;
}
