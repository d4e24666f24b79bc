// The C interface of the CPU kernels: pointers, sizes, no torch, no Python.
//
// As in mal_kernels.h a function takes one struct of fields that are 8 bytes wide, here with
// pointers to the host's memory, contiguous; shapes have been checked by the caller. It returns 0,
// or why it computed nothing.
#pragma once
#include "../mal_kernels.h"

// MAL_CPU_GATES: lr is not finite and >= 0, or momentum or decay not in [0, 1]. MAL_CPU_PLACES: an
// index is out of bounds, or a token named twice.
enum mal_cpu_error { MAL_CPU_DONE, MAL_CPU_MEMORY, MAL_CPU_GATES, MAL_CPU_PLACES };

struct mal_cpu_neural_memory_fwd_args {
  mal_memory_call call;  // q, k, v may be MAL_FLOAT32 too
  int64_t threads;
  mal_state new_weights, new_trace;
  mal_state new_anchor;  // or nulls: not wanted
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

// A read of a memory as it is: see ops/memory_read.py.
struct mal_cpu_memory_read {
  int64_t dtype;  // of q
  int64_t rows, T, H, D, E, activation, threads;
  const void* q;              // [B, T, H, D]
  const int64_t* cu_seqlens;  // [rows + 1], or null
  mal_state weights;
};

struct mal_cpu_memory_read_fwd_args {
  mal_cpu_memory_read call;
  void* output;  // [B, T, H, D] of dtype
};
MAL_API int mal_cpu_memory_read_fwd(const mal_cpu_memory_read_fwd_args*);

struct mal_cpu_memory_read_bwd_args {
  mal_cpu_memory_read call;
  const void* d_output;  // as output
  void* d_q;
  mal_state d_weights;
};
MAL_API int mal_cpu_memory_read_bwd(const mal_cpu_memory_read_bwd_args*);

// The read of a turn: see ops/aligned_residual_read.py.
struct mal_cpu_aligned_residual_read_fwd_args {
  mal_cpu_memory_read read;  // float32, without q and cu_seqlens
  int64_t dtype;             // of hidden
  int64_t N, Dm, positions;  // tokens, features of the host, B S
  const void* hidden;        // [B S, Dm]
  const int64_t* token_index;  // [N]
  const int64_t* state_index;
  const float* norm;  // [Dm]
  const float* w_q;   // [H D, Dm]
  const float* w_gate;
  const float* w_out;  // [Dm, H D]
  void* output;        // a copy of hidden, or hidden itself: the named rows are written
};
MAL_API int mal_cpu_aligned_residual_read_fwd(const mal_cpu_aligned_residual_read_fwd_args*);

// The recurrence of momentum and decay, and its gradients; those of gates are partial sums, one for
// each block of 256 features.
struct mal_cpu_momentum_scan_fwd_args {
  mal_momentum_scan_fwd_args scan;  // without a stream; update may be MAL_FLOAT32 too
  int64_t threads;
};
MAL_API int mal_cpu_momentum_scan_fwd(const mal_cpu_momentum_scan_fwd_args*);

struct mal_cpu_momentum_scan_bwd_args {
  mal_momentum_scan_bwd_args scan;
  int64_t threads;
};
MAL_API int mal_cpu_momentum_scan_bwd(const mal_cpu_momentum_scan_bwd_args*);

// NH of T frames of K words, K even: frames beside each other (step_t 1), or their words (step_k 1).
struct mal_cpu_clip_hash_args {
  int64_t T, K;
  int64_t step_t, step_k;  // from a frame to the next, from a word to the next
  const uint32_t* words;
  const uint32_t* key;  // [K]
  uint64_t* hashes;     // [T]
};
MAL_API int mal_cpu_clip_hash(const mal_cpu_clip_hash_args*);

MAL_API int64_t mal_cpu_lanes(void);  // floats of a vector: what the library was compiled for
