// The way of one row and head forward over its tiles.
#pragma once
#include "mal_cpu.h"
#include "tile.h"

namespace mal {

struct Walk {
  const Task& task;
  Memory W, S, A, I;   // weights, momentum, anchor; init or none
  Memory own_A;        // the anchor of a chunk that opens here
  float* last_T;       // the anchor's last layer transposed
  bool keeps_anchor;   // A is wanted after the last tile
  Tile tile;

  // W and S live in `weights` and `trace` where these need no padding.
  Walk(const Task& k, Arena& arena, const mal_state& weights, const mal_state& trace, bool keeps)
      : Walk(k, arena, take_working(arena, k.shape, weights, k.g),
             take_working(arena, k.shape, trace, k.g), keeps) {}

  Walk(const Task& k, Arena& arena, Memory weights, Memory trace, bool keeps)
      : task(k), W(weights), S(trace), own_A(take_memory(arena, k.shape)), last_T(arena.take(padded(k.shape.D), padded(k.shape.E))),
        keeps_anchor(keeps), tile(arena, k.shape) {
    const Shape& z = k.shape;
    load_memory(z, k.c.weights, k.g, W);
    load_memory(z, k.c.trace, k.g, S);
    A = load_or_point(arena, z, k.c.anchor.last ? k.c.anchor : k.c.weights, k.g);
    if (k.c.init.last) I = load_or_point(arena, z, k.c.init, k.g);
    if (k.c.anchor.last) transpose_anchor();
  }

  void factors(Place at, float* surprise) {
    if (at.opens) {
      const bool used_once = at.closes && !keeps_anchor;  // before the write changes W
      A = used_once ? W : own_A;
      if (!used_once) copy_memory(task.shape, W, A);
      transpose_anchor();
    }
    mal::factors(task, tile, at, A, last_T, surprise);
    if (task.c.token_steps) coefficients(task, tile, at);
  }
  void write(Place at) { mal::write(task, tile, at, W, S, I); }

 private:
  void transpose_anchor() {
    const Layer& y = task.shape.layer[LAST];
    if (task.shape.hidden) transpose(y.rows, y.stride, A.at[LAST], y.stride, last_T, y.rows);
  }
};

}  // namespace mal
