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
// with the factors X and δ of block.cuh and the coefficients of mal_kernels/reference.py for the
// tile's last token. A tile ends where its chunk ends; with chunk steps only the first tile of a
// chunk has momentum and decay.
#include "causal_read.cuh"

namespace mal::memory {
namespace {

template <class T, int kD>
struct Memory : Read<Reading<T, kD>> {
  using Base = Read<Reading<T, kD>>;
  using Base::a, Base::s, Base::thread, Base::row, Base::length, Base::chunk_size, Base::locate;
  using Base::is_deep, Base::has_gain, Base::gain_at, Base::load_state, Base::store_weights;
  using Base::store_trace, Base::set_anchor, Base::fetch, Base::load_gates, Base::add_gradients;
  using Base::first_layer, Base::last_layer, Base::find_factors, Base::find_coefficients;
  using Base::read, Base::store_output, Base::w1, Base::s1, Base::w2, Base::s2;

  const mal_neural_memory_fwd_args& to;

  MAL_DEVICE explicit Memory(const mal_neural_memory_fwd_args& arguments)
      : Base(arguments.call), to(arguments) {}

  // --- the write -------------------------------------------------------------------------------

  MAL_DEVICE void advance(int count, int turn) {
    if (is_deep()) advance_layer(first_layer(), s.k[turn], s.d1);
    advance_layer(last_layer(), s.h, s.d2);
    finish(w1, s1, w2, s2);
    if (has_gain() && thread < a.D) advance_gain(count, turn);
  }

  // W ← β W + f S + (1 - β) W_init - (w ⊙ X)ᵀ δ and S ← ε S - (E ⊙ X)ᵀ δ
  template <class AnyLayer, class X, class D>
  MAL_DEVICE void advance_layer(const AnyLayer& layer, const X& x, const D& d) {
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
      block_sync();  // all of this tile is there; the last one is over
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
      find_factors(token, count, turn, to.surprise);
      find_coefficients(count, opens, turn);
      locate();
      if (a.q) read(opens, turn);
      locate();
      advance(count, turn);
      if (a.q) {
        cluster_sync();  // y, of every block
        store_output(to.output, token, count, turn);
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

};

template <class T, int kD>
MAL_KERNEL(kThreads, 1) neural_memory_fwd(mal_neural_memory_fwd_args a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // never launched on a GPU without clusters
  Memory<T, kD>(a).walk();
#endif
}

}  // namespace
}  // namespace mal::memory

MAL_API int mal_neural_memory_fwd(const mal_neural_memory_fwd_args* a) {
  using namespace mal::memory;
  return for_type_of(a->call, [&]<class T, int kD>() {
    return launch_clusters<Reading<T, kD>>(neural_memory_fwd<T, kD>, a->call, a->call.rows, a->stream,
                                           *a);
  });
}
