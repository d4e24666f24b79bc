// The write of the memory and its causal read, forward.
//
// One task is a row and head: its weights and momentum stay in the core's cache while it walks over
// its tokens, a tile at a time, so that scratch grows neither with T nor with the chunk. With E
// units, the C tokens of a tile cost 11 C D E + 2 C² (D + E) multiply-adds, 7 C D E without a read,
// and with chunk steps 7 and 5 C D E. See tile.h for the mathematics.
#include "gates.h"
#include "walk.h"

MAL_API int64_t mal_cpu_lanes(void) { return mal::VL; }

MAL_API int mal_cpu_neural_memory_fwd(const mal_cpu_neural_memory_fwd_args* args) {
  const mal_memory_call& call = args->call;
  if (!mal::gates_fit(call)) return MAL_CPU_GATES;
  const mal::Shape shape(call);
  return mal::each_task(call, args->threads, [&](long g, mal::Arena& arena) {
    const mal::Task task(call, shape, g);
    const bool keeps_anchor = args->new_anchor.last;
    const mal::State to{mal::take_working(arena, shape, args->new_weights, g),
                        mal::take_working(arena, shape, args->new_trace, g)};
    mal::Walk walk(task, arena, to, keeps_anchor);
    for (mal::Place at : task.places()) {
      walk.factors(at, args->surprise);
      if (call.q) {
        mal::read(task, walk.tile, at, walk.now.W, walk.now.S, walk.I, false);
        task.unpack_tokens(walk.tile.zq, at, args->output);
      }
      walk.write(at);
    }
    mal::store_memory(shape, walk.now.W, args->new_weights, g);
    mal::store_memory(shape, walk.now.S, args->new_trace, g);
    if (keeps_anchor) mal::store_memory(shape, walk.A, args->new_anchor, g);
  });
}
