// The way of one row and head forward over its tiles.
#pragma once
#include "mal_cpu.h"
#include "tile.h"

namespace mal {

struct Walk {
  const Task& task;
  State to, now;      // weights and momentum: where they are written, and where they are
  Memory A, I;        // anchor; init or none
  Memory own_A;       // the anchor of a chunk that opens here
  float* last_T;      // the anchor's last layer transposed
  bool keeps_anchor;  // A is wanted after the last tile
  Tile tile;

  Walk(const Task& k, Arena& arena, State written, bool keeps)
      : task(k), to(written), own_A(take_memory(arena, k.shape)),
        last_T(arena.take(padded(k.shape.D), padded(k.shape.E))), keeps_anchor(keeps),
        tile(arena, k.shape) {
    const Shape& z = k.shape;
    now.W = load_or_point(arena, z, k.c.weights, k.g);
    now.S = load_or_point(arena, z, k.c.trace, k.g);
    A = k.c.anchor.last ? load_or_point(arena, z, k.c.anchor, k.g) : now.W;
    if (k.c.init.last) I = load_or_point(arena, z, k.c.init, k.g);
    if (k.c.anchor.last) transpose_anchor();
  }

  void factors(Place at, float* surprise) {
    if (at.opens) {
      const bool used_once = at.closes && !keeps_anchor;  // before the write changes W
      A = used_once ? now.W : own_A;
      if (!used_once) copy_memory(task.shape, now.W, A);
      transpose_anchor();
    }
    mal::factors(task, tile, at, A, last_T, surprise);
    if (task.c.token_steps) coefficients(task, tile, at);
  }
  void write(Place at) { mal::write(task, tile, at, now, to, I); }

 private:
  void transpose_anchor() {
    const Layer& y = task.shape.layer[LAST];
    if (task.shape.hidden) transpose(y.rows, y.stride, A.at[LAST], y.stride, last_T, y.rows);
  }
};

}  // namespace mal
