// The C interface of the CPU kernels: pointers, sizes, no torch, no Python.
//
// As in mal_kernels.h a function takes one struct of fields that are 8 bytes wide, here with
// pointers to the host's memory, contiguous; shapes have been checked by the caller. It returns 0,
// or 1 where memory ran out.
#pragma once
#include "../mal_kernels.h"

struct mal_cpu_neural_memory_fwd_args {
  mal_memory_call call;  // q, k, v may be MAL_FLOAT32 too
  int64_t threads;
  mal_state new_weights, new_trace;
  mal_state new_anchor;  // or nulls
  void* output;          // [B, T, H, D] of dtype, with q
  float* surprise;       // [B, T, H]
};
MAL_API int mal_cpu_neural_memory_fwd(const mal_cpu_neural_memory_fwd_args*);

// Gradients of every input that is given, from those of every output; momentum's and decay's with
// chunk steps are left as they are where a row has no tokens.
struct mal_cpu_neural_memory_bwd_args {
  mal_memory_call call;
  int64_t threads;
  const void* d_output;  // [B, T, H, D] of dtype, with q
  const float* d_surprise;
  mal_state d_new_weights, d_new_trace;
  mal_state d_new_anchor;  // or nulls
  void* d_q;
  void* d_k;
  void* d_v;
  float* d_lr;
  float* d_momentum;
  float* d_decay;
  mal_state d_weights, d_trace;
  mal_state d_anchor;
  mal_state d_init;
};
MAL_API int mal_cpu_neural_memory_bwd(const mal_cpu_neural_memory_bwd_args*);

MAL_API int64_t mal_cpu_lanes(void);  // floats of a vector: what the library was compiled for
