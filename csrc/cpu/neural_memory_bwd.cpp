// The write of the memory and its causal read, backward.
//
// A task walks its row forward once more, without reading, for the state before every tile, and
// then from the last tile to the first; of a tile everything else is computed again. So what is
// alive is one state a tile, of the tasks that run, and nothing is kept from the forward. A tile
// costs 32 C D E + 7 C² (D + E) multiply-adds, with chunk steps 23 C D E.
#include "factors_bwd.h"
#include "read_bwd.h"
#include "walk.h"
#include "write_bwd.h"

namespace mal {
namespace {

// W and S before every tile.
struct Kept {
  std::vector<Memory> W, S;
};

Kept walk_forward(Walk& walk, const std::vector<Place>& places, Arena& arena) {
  const Shape& z = walk.task.shape;
  Kept kept;
  float* at = arena.take(2 * long(places.size()), z.size());
  const auto keep = [&](Memory m) {
    Memory copy;
    for (int l = z.begin; l < z.end; at += z.layer[l++].size()) copy.at[l] = at;
    copy_memory(z, m, copy);
    return copy;
  };
  for (const Place& place : places) {
    kept.W.push_back(keep(walk.now.W));
    kept.S.push_back(keep(walk.now.S));
    if (&place == &places.back()) break;
    walk.factors(place, nullptr);
    walk.write(place);
  }
  return kept;
}

void backward(const mal_cpu_neural_memory_bwd_args& args, const Task& k, Arena& arena) {
  const Shape& z = k.shape;
  Gradients d(k, arena, take_working(arena, z, args.d_weights, k.g),
              take_working(arena, z, args.d_trace, k.g));
  load_memory(z, args.d_new_weights, k.g, d.W);
  load_memory(z, args.d_new_trace, k.g, d.S);
  zero_memory(z, d.A);
  zero_memory(z, d.I);
  if (args.d_new_anchor.last) load_memory(z, args.d_new_anchor, k.g, d.A);

  const State scratch{take_memory(arena, z), take_memory(arena, z)};
  Walk walk(k, arena, scratch, false);
  const Memory anchor = walk.A;  // the one given
  Tile& t = walk.tile;
  if (walk.I) transpose_memory(z, walk.I, d.IT);
  const std::vector<Place> places = k.places();
  const Kept kept = walk_forward(walk, places, arena);
  for (long i = long(places.size()) - 1; i >= 0; i--) {
    const Place at = places[i];
    const Memory W = kept.W[i], S = kept.S[i];
    if (at.closes) {
      long first = i;  // tile of the chunk
      while (first && !places[first].opens) first--;
      walk.A = places[first].opens ? kept.W[first] : anchor;
      transpose_memory(z, walk.A, d.AT);
    }
    factors(k, t, at, walk.A, z.hidden ? d.AT.at[LAST] : nullptr, nullptr);
    d.begin_tile(z, t.C);
    if (k.c.token_steps) {
      coefficients(k, t, at);
      token_write_bwd(k, t, d, W, S, walk.I);
    } else {
      chunk_write_bwd(k, t, d, at, W, S, walk.I, args.d_momentum, args.d_decay);
    }
    if (k.c.q) read_bwd(k, t, d, at, W, S, walk.I, args.d_output, args.d_q);
    if (k.c.token_steps) coefficients_bwd(k, t, d, at, args.d_momentum, args.d_decay);
    rates_bwd(k, t, d, at, args.d_lr);
    factors_bwd(k, t, d, at, walk.A, args.d_surprise, args.d_k, args.d_v);
    if (at.opens) {
      each_vector(z, [&](int l, long j) {
        store(d.W.at[l] + j, load(d.W.at[l] + j) + load(d.A.at[l] + j));
      });
      zero_memory(z, d.A);
    }
  }
  if (!args.d_anchor.last)  // without tokens the anchor is the weights
    each_vector(z, [&](int l, long j) {
      store(d.W.at[l] + j, load(d.W.at[l] + j) + load(d.A.at[l] + j));
    });
  store_memory(z, d.W, args.d_weights, k.g);
  store_memory(z, d.S, args.d_trace, k.g);
  if (args.d_anchor.last) store_memory(z, d.A, args.d_anchor, k.g);
  if (args.d_init.last) store_memory(z, d.I, args.d_init, k.g);
}

}  // namespace
}  // namespace mal

MAL_API int mal_cpu_neural_memory_bwd(const mal_cpu_neural_memory_bwd_args* args) {
  const mal::Shape shape(args->call);
  return mal::each_task(args->call, args->threads, [&](long g, mal::Arena& arena) {
    mal::backward(*args, mal::Task(args->call, shape, g), arena);
  });
}
