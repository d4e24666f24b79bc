// The read of a memory as it is, M(q; W), of one row and head: the read of chunk steps (tile.h),
// whose tokens see the weights before their chunk, without a write.
#pragma once
#include "mal_cpu.h"
#include "read_bwd.h"

namespace mal {

inline mal_memory_call as_chunk_steps(const mal_cpu_memory_read& r) {
  mal_memory_call c{};
  c.dtype = r.dtype, c.rows = r.rows, c.T = r.T, c.H = r.H, c.D = r.D, c.E = r.E;
  c.chunk_size = 1 << 30, c.activation = r.activation;
  c.q = r.q, c.cu_seqlens = r.cu_seqlens, c.weights = r.weights;
  return c;
}

inline void memory_read_fwd(const Task& task, Arena& arena, void* output) {
  const Memory W = load_or_point(arena, task.shape, task.c.weights, task.g);
  Tile tile(arena, task.shape);
  for (const Place& at : task.places()) {
    tile.C = at.C;
    read(task, tile, at, W, {}, {}, false);
    task.unpack_tokens(tile.zq, at, output);
  }
}

inline void memory_read_bwd(const Task& task, Arena& arena, const void* d_output, void* d_q,
                            const mal_state& d_weights) {
  const Shape& z = task.shape;
  const Memory W = load_or_point(arena, z, task.c.weights, task.g);
  Tile tile(arena, z);
  Gradients d(task, arena, take_working(arena, z, d_weights, task.g), take_memory(arena, z));
  zero_memory(z, d.W);
  for (const Place& at : task.places()) {
    tile.C = at.C;
    d.begin_tile(z, at.C);
    read_bwd(task, tile, d, at, W, {}, {}, d_output, d_q);
  }
  store_memory(z, d.W, d_weights, task.g);
}

}  // namespace mal
