// The read of a memory as it is, forward and backward.
#include "memory_read.h"

MAL_API int mal_cpu_memory_read_fwd(const mal_cpu_memory_read_fwd_args* args) {
  const mal_memory_call call = mal::as_chunk_steps(args->call);
  const mal::Shape shape(call);
  return mal::each_task(call, args->call.threads, [&](long g, mal::Arena& arena) {
    mal::memory_read_fwd(mal::Task(call, shape, g), arena, args->output);
  });
}

MAL_API int mal_cpu_memory_read_bwd(const mal_cpu_memory_read_bwd_args* args) {
  const mal_memory_call call = mal::as_chunk_steps(args->call);
  const mal::Shape shape(call);
  return mal::each_task(call, args->call.threads, [&](long g, mal::Arena& arena) {
    mal::memory_read_bwd(mal::Task(call, shape, g), arena, args->d_output, args->d_q,
                         args->d_weights);
  });
}
