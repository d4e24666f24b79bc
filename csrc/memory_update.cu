// A memory of one or two layers: its write and its causal read, with W and S on chip from the first
// token to the last.
//
// A cluster of blocks takes a row's head and walks its tokens in tiles. Each block holds some hidden
// units: its slice of W and S stays in registers, in float32, as the accumulators of the products
// that update it; what these products read, the anchor and a tile's factors, stands in shared memory
// in 16 bits. The hidden units meet once a tile, when the slices of h W2 are summed over distributed
// shared memory, once more for the norms, if gradients are clipped, and once for what is read.
//
//     W ← β W + f S + (1 - β) W_init - (w ⊙ X)ᵀ δ        S ← ε S - (E ⊙ X)ᵀ δ        per layer
//
// with the factors X and δ of tiles.cuh and the coefficients of mal_kernels/reference.py for the
// tile's last token. A tile ends where its chunk ends; with chunk steps only the first tile of a
// chunk has momentum and decay, and its tokens read M(q) at the anchor. With token steps
//
//     zq = β ⊙ (Q W1) + f ⊙ (Q S1) + (1 - β) ⊙ (Q W1_init) - [w ⊙ (Q Kᵀ)] δ1        hq = act(zq)
//     y  = the same of hq and W2, with [w ⊙ (hq hᵀ)] δ2
//
// where W and S are those before the tile and β, f, w now stand for every token. Each block has its
// hidden units of hq, and the part of y that comes from them.
#include "tiles.cuh"

namespace mal::memory {
namespace {

template <class T, int kD>
struct Shared : Factors<T, kD> {
  static constexpr int kHidden = units_for(kD);
  alignas(16) T q[kTokens][kD + kPad];
  T hq[kTokens][kHidden + kPad];
  T scores[kTokens][kTokens + kPad];
  // what W, S and W_init have in the weights of every token
  float of_w[kTokens], of_s[kTokens], of_init[kTokens];
};

// `memory`, whose numbers are not needed any more, as another array.
template <class Array, class From>
MAL_DEVICE Array& in_place_of(From& memory) {
  static_assert(sizeof(Array) <= sizeof(From), "does not fit");
  return reinterpret_cast<Array&>(memory);
}

template <class T, int kD>
struct Memory : Tiles<Shared<T, kD>> {
  using Base = Tiles<Shared<T, kD>>;
  using typename Base::Slice;
  using Base::a, Base::s, Base::thread, Base::lane, Base::warp, Base::rank, Base::blocks;
  using Base::row, Base::head, Base::begin, Base::length, Base::chunk_size;
  using Base::w1, Base::s1, Base::w2, Base::s2, Base::first, Base::last, Base::wide, Base::narrow;
  using Base::is_deep, Base::has_gain, Base::clips, Base::first_slice, Base::last_slice;
  using Base::gain_at, Base::load_state, Base::store_weights, Base::store_trace, Base::set_layer;
  using Base::set_anchor, Base::fetch, Base::load_gates, Base::coefficients, Base::hidden;
  using Base::take_units, Base::activate_all, Base::project, Base::store_part, Base::error;
  using Base::hidden_delta, Base::exchange_norms, Base::scale_coefficients, Base::clip;
  using Base::add_gradients, Base::over_sharing, Base::feature_of, Base::sum_parts;
  using Base::normalise, Base::locate;

  static constexpr int kHidden = Base::kHidden, kNarrow = Base::kNarrow, kWide = Base::kWide;
  static constexpr int kOfW1 = Base::kOfW1, kOfW2 = Base::kOfW2, kShare = Base::kShare;
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
  using First = Layer<T[kD][kHidden + kPad], kOfW1>;
  using Last = Layer<T[kHidden][kD + kPad], kOfW2>;

  const mal_memory_update_args& to;
  const bool reads_all = a.q && a.token_steps;  // every token's own weights

  MAL_DEVICE explicit Memory(const mal_memory_update_args& arguments)
      : Base(arguments.call), to(arguments) {}

  MAL_DEVICE First first_layer() {
    return {w1, s1, s.w1, first, first_slice(row), a.init.first};
  }
  MAL_DEVICE Last last_layer() { return {w2, s2, s.w2, last, last_slice(row), a.init.last}; }

  // --- the write -------------------------------------------------------------------------------

  MAL_DEVICE void advance(int count, int turn) {
    if (is_deep()) advance_layer(first_layer(), s.k[turn], s.d1);
    advance_layer(last_layer(), s.h, s.d2);
    if (has_gain() && thread < a.D) advance_gain(count, turn);
  }

  // W ← β W + f S + (1 - β) W_init - (w ⊙ X)ᵀ δ and S ← ε S - (E ⊙ X)ᵀ δ
  template <class AnyLayer, int kPitchX, int kPitchD>
  MAL_DEVICE void advance_layer(const AnyLayer& layer, const T (*x)[kPitchX],
                                const T (*d)[kPitchD]) {
    float beta = s.beta, f = s.f, epsilon = s.epsilon;
    layer.slice.each(layer.w, [&](int n, int i, int64_t) {
      layer.w[n][i] = beta * layer.w[n][i] + f * layer.trace[n][i];
      layer.trace[n][i] *= epsilon;
    });
    if (layer.init && beta != 1)
      layer.slice.each(layer.w, [&](int n, int i, int64_t at) {
        if (at >= 0) layer.w[n][i] += (1 - beta) * layer.init[at];
      });
    add_gradients(layer.w, layer.trace, x, d, layer.part);
  }

  // γ of this thread's feature; what a token reads takes the place of its gradient's factor.
  MAL_DEVICE void advance_gain(int count, int turn) {
    float w = s.gain[0][thread], trace = s.gain[1][thread];
    const float init = a.init.gain ? a.init.gain[gain_at(thread, row)] : 0;
    if (!a.token_steps) {
      w = s.beta * w + s.f * trace + (1 - s.beta) * init;
      trace *= s.epsilon;
    }
    for (int t = 0; t < count; t++) {
      float& d = s.part[1 - turn][t][thread];
      float step = -s.lr[t] * d;
      if (a.token_steps) {
        trace = s.momentum[t] * trace + step;
        w = (1 - s.decay[t]) * w + s.decay[t] * init + trace;
        d = w;
      } else {
        trace += step, w += step;
        d = s.gain[2][thread];
      }
    }
    s.gain[0][thread] = w, s.gain[1][thread] = trace;
  }

  // --- the read --------------------------------------------------------------------------------

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
  template <int kDepth, class AnyLayer, int kCount, int kPitchX, int kPitchD>
  MAL_DEVICE void read_layer(float (&sum)[kCount][4], Place part, const AnyLayer& layer,
                             const T (*x)[kPitchX], const T (*y)[kPitchX], const T (*d)[kPitchD],
                             bool opens, int turn) {
    using Matrix = typename AnyLayer::Matrix;
    auto& other = in_place_of<Matrix>(s.v[turn]);
    add_product<kDepth>(sum, part, x, opens ? layer.anchor : other, s.of_w);
    add_product<kDepth>(sum, part, x, in_place_of<Matrix>(s.slope), s.of_s);
    score<kDepth>(x, y, turn);
    __syncthreads();  // the scores; W and S have been read
    if (layer.init) {
      set_layer(other, layer.w, layer.part, layer.slice, layer.init);
      __syncthreads();
      add_product<kDepth>(sum, part, x, other, s.of_init);
    }
    multiply<kTokens, false>(sum, s.scores, part.row, d, part.column);
  }

  // sum += of ⊙ (x w)
  template <int kDepth, int kCount, int kPitchX, int kPitchW>
  MAL_DEVICE void add_product(float (&sum)[kCount][4], Place part, const T (*x)[kPitchX],
                              const T (*w)[kPitchW], const float* of) const {
    float product[kCount][4] = {};
    multiply<kDepth, false>(product, x, part.row, w, part.column);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float factor = of[part.row + accumulator_of(lane, i).row];
#pragma unroll
      for (int n = 0; n < kCount; n++) sum[n][i] += factor * product[n][i];
    }
  }

  // scores = w ⊙ (x yᵀ)
  template <int kDepth, int kPitch>
  MAL_DEVICE void score(const T (*x)[kPitch], const T (*y)[kPitch], int turn) {
    const Place square = part_of(warp, Base::kTile, 8 * kScores);
    float product[kScores][4] = {};
    multiply<kDepth, true>(product, x, square.row, y, square.column);
#pragma unroll
    for (int n = 0; n < kScores; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        Place p = accumulator_of(lane, i);
        int t = square.row + p.row, of = square.column + 8 * n + p.column;
        s.scores[t][of] = from_float<T>(s.part[turn][t][of] * product[n][i]);
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
    __syncthreads();  // hq
    float y[kWide][4] = {};
    if (reads_all) {
      set_read(last_layer(), opens, turn);
      __syncthreads();
      read_layer<kHidden>(y, wide, last_layer(), s.hq, s.h, s.d2, opens, turn);
    } else {
      multiply<kHidden, false>(y, s.hq, wide.row, s.w2, wide.column);
    }
    store_part(y, turn);
  }

  // M(q) of the tokens that are this block's to store, from the parts of all blocks.
  MAL_DEVICE void store_output(int token, int count, int turn) {
    const int t = thread / kSharing;
    if (block_of(t, blocks) != static_cast<int>(rank)) return;
    float* o = s.part[turn][t];
    float mean = over_sharing(sum_parts(o, turn)) / a.D;
    if (has_gain()) normalise(o, mean);
    if (t >= count) return;
    T* out = static_cast<T*>(to.output) + ((begin + token + t) * a.H + head) * a.D;
#pragma unroll 2
    for (int i = 0; i < kShare && feature_of(i) < a.D; i += 4) {
      const int feature = feature_of(i);
      Vector<T, 4> four;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float y = o[feature + j];
        if (has_gain())
          y = to_float(s.q[t][feature + j]) + (1 + s.part[1 - turn][t][feature + j]) * y;
        four.at[j] = from_float<T>(y);
      }
      *reinterpret_cast<Vector<T, 4>*>(out + feature) = four;
    }
  }

  // --- a row -----------------------------------------------------------------------------------

  MAL_DEVICE void walk() {
    int in_chunk = a.position ? a.position[row] : 0, chunk = 0;
    int count = tile_length(0, in_chunk, chunk_size, length);
    if (length > 0) fetch(0, count, 0);
    load_state(a.weights, a.trace, row);
    if (in_chunk) set_anchor(a.anchor, row);
    int64_t tile = to.first_tile ? to.first_tile[row] : 0;
    int turn = 0;
    for (int token = 0; token < length; turn = 1 - turn, tile++) {
      const bool opens = in_chunk == 0;
      locate();
      keep_states(token, tile, opens);
      copy_wait<0>();
      __syncthreads();  // all of this tile is there; the last one is over
      load_gates(token, count, chunk);
      if (a.q) fetch(s.q, a.q, token, count);
      copy_commit();
      int next = token + count;
      int next_in_chunk = (in_chunk + count) % chunk_size;
      int next_count = tile_length(next, next_in_chunk, chunk_size, length);
      if (next < length)
        fetch(next, next_count, 1 - turn);
      else
        copy_commit();
      find_factors(token, count, turn);
      find_coefficients(count, opens, turn);
      locate();
      if (a.q) read(opens, turn);
      locate();
      advance(count, turn);
      if (a.q) {
        cluster_sync();  // y, of every block
        store_output(token, count, turn);
      }
      if (next_in_chunk == 0) chunk++;
      token = next, in_chunk = next_in_chunk, count = next_count;
    }
    store_weights(to.new_weights, row);
    store_trace(to.new_trace, row);
    cluster_sync();  // no block leaves while another reads its shared memory
  }

  // What others want of the state before a tile: the backward, the anchor of this chunk, the next
  // call.
  MAL_DEVICE void keep_states(int token, int64_t tile, bool opens) {
    if (to.tile_weights.last) {
      store_weights(to.tile_weights, tile);
      store_trace(to.tile_trace, tile);
    }
    if (!opens) return;
    set_anchor({}, row);
    if (to.new_anchor.last && token + chunk_size > length) store_weights(to.new_anchor, row);
  }

  // h and δ of the tile; δ1 is there for all threads after the next barrier.
  MAL_DEVICE void find_factors(int token, int count, int turn) {
    hidden(turn);
    __syncthreads();  // h
    project(turn);
    cluster_sync();  // h W2, of every block
    error(token, count, turn, turn, to.surprise);
    __syncthreads();  // δ2
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
    __syncthreads();  // δ1, the coefficients and q
    if (!clips()) return;
    clip(turn);
    __syncthreads();
  }
};

template <class T, int kD>
MAL_KERNEL(kThreads, 1) memory_forward(mal_memory_update_args a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // never launched on a GPU without clusters
  Memory<T, kD>(a).walk();
#endif
}

template <class T, int kD>
int start(const mal_memory_update_args& a) {
  constexpr size_t kBytes = sizeof(Shared<T, kD>);
  static_assert(kBytes <= 227 * 1024, "more than a block may have on Hopper");
  unsigned blocks = blocks_for(a.call.E, units_for(kD));
  if (!blocks) return kInvalidArgument;
  dim3 grid = {blocks, static_cast<unsigned>(a.call.H), static_cast<unsigned>(a.call.rows)};
  dim3 block = {kThreads, 1, 1};
  return launch(memory_forward<T, kD>, grid, block, kBytes, blocks, a.stream, a);
}

}  // namespace
}  // namespace mal::memory

MAL_API int mal_memory_update(const mal_memory_update_args* a) {
  using namespace mal::memory;
  const mal_memory_call& call = a->call;
  if (call.D % 8 || call.D > 128) return mal::kInvalidArgument;
  bool is_narrow = call.D <= 64;
  if (call.dtype == MAL_FLOAT16)
    return is_narrow ? start<mal::fp16, 64>(*a) : start<mal::fp16, 128>(*a);
  if (call.dtype == MAL_BFLOAT16)
    return is_narrow ? start<mal::bf16, 64>(*a) : start<mal::bf16, 128>(*a);
  return mal::kInvalidArgument;
}
