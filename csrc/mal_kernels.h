// The C interface of libmal_kernels.so. Neither torch nor Python is seen here: pointers to device
// memory, sizes and a CUDA stream.
//
// A function takes one struct whose fields are all 8 bytes wide, in the order written here, which is
// that of mal_kernels/_cuda (a test compares the names). It launches, never waits, allocates nothing
// and keeps nothing. It returns 0, or an error that mal_error() names; shapes have been checked by
// the caller. `trace` is the momentum S of the memory: the word momentum is the gate η.
#pragma once
#include <stdint.h>

#define MAL_API extern "C" __attribute__((visibility("default")))

// element type of tokens; gates, states and accumulators are float32
enum mal_dtype { MAL_FLOAT32 = 0, MAL_FLOAT16 = 1, MAL_BFLOAT16 = 2 };

MAL_API const char* mal_error(int error);
MAL_API const char* mal_targets(void);  // "80 90a 100": what the library was compiled for
// the CUDA version (1000 * major + 10 * minor) that the driver supports, 0 without a driver, and
// that the library needs
MAL_API int mal_driver_version(void);
MAL_API int mal_runtime_version(void);

// S_t = momentum_t S_{t-1} + update_t,  W_t = (1 - decay_t) W_{t-1} + S_t, for `rows` sequences.
struct mal_momentum_scan_fwd_args {
  int64_t dtype;              // of update
  int64_t rows, T, H, F;      // F numbers a head; T tokens a row where cu_seqlens is null
  const void* update;         // [B, T, H, F]
  const float* momentum;      // [B, T, H] or null: none
  const float* decay;         // as momentum
  const float* weights0;      // [rows, H, F], or null: zero
  const float* trace0;
  const int64_t* cu_seqlens;  // [rows + 1], or null
  float* weights;             // [B, T, H, F]
  float* trace;
  void* stream;
};
MAL_API int mal_momentum_scan_fwd(const mal_momentum_scan_fwd_args*);

// Its gradients. Those of the gates are partial sums, one for each block of 512 features, or null
// where not wanted.
struct mal_momentum_scan_bwd_args {
  int64_t dtype;
  int64_t rows, T, H, F, tokens;  // tokens: B * T
  const float* d_weights;         // [B, T, H, F]
  const float* d_trace;
  const float* weights;  // what the forward returned
  const float* trace;
  const float* momentum;
  const float* decay;
  const float* weights0;
  const float* trace0;
  const int64_t* cu_seqlens;
  void* d_update;     // [B, T, H, F] of dtype
  float* d_momentum;  // [ceil(F / 512), B, T, H]
  float* d_decay;
  float* d_weights0;  // [rows, H, F], or null
  float* d_trace0;
  void* stream;
};
MAL_API int mal_momentum_scan_bwd(const mal_momentum_scan_bwd_args*);

// Layers of a memory's state, float32: first [rows, H, D, E] (null at depth 1), last [rows, H, E, D]
// (at depth 1 E = D), gain [rows, H, D] (null without residual_norm).
struct mal_state {
  float* first;
  float* last;
  float* gain;
};

// A call of the memory: see ops/neural_memory.py, whose arguments these are.
struct mal_memory_call {
  int64_t dtype;  // of q, k and v: MAL_FLOAT16 or MAL_BFLOAT16
  int64_t rows, T, H, D, E;
  int64_t chunk_size;   // T and it below 2^30
  int64_t chunk_gates;  // of a row, where cu_seqlens is null
  int64_t token_steps;  // else chunk steps
  int64_t activation;   // 0 gelu, 1 gelu_tanh, 2 silu, 3 relu
  double max_grad_norm;       // 0: no bound
  const void* q;              // [B, T, H, D], or null: no read
  const void* k;              // [B, T, H, D]
  const void* v;              // [B, T, H, D]
  const float* lr;            // [B, T, H]
  const float* momentum;      // [B, T, H], with chunk steps [B, chunk gates, H], or null
  const float* decay;         // as momentum
  const int64_t* cu_seqlens;  // [rows + 1], or null
  const int64_t* first_gate;  // [rows], with cu_seqlens and chunk steps: a row's first chunk gate
  const int64_t* position;    // [rows], of a row inside its first chunk, or null
  mal_state weights, trace;
  mal_state anchor;  // given with position
  mal_state init;    // or nulls
};

// The write of the memory and, with q, its causal read.
struct mal_neural_memory_fwd_args {
  mal_memory_call call;
  mal_state new_weights, new_trace;
  mal_state new_anchor;  // or nulls; left as it is where no row opens its last chunk
  // the state before every tile of 64 tokens or less, with tiles for rows and a row's first tile in
  // first_tile [rows]; or nulls
  mal_state tile_weights, tile_trace;
  const int64_t* first_tile;
  void* output;     // [B, T, H, D], with q
  float* surprise;  // [B, T, H]
  void* stream;
};
MAL_API int mal_neural_memory_fwd(const mal_neural_memory_fwd_args*);

// What the gradients of the read leave to those of the write. With chunk steps that is tile_weights
// alone, and of the anchor.
struct mal_read_gradients {
  mal_state tile_weights, tile_trace;  // of the state before every tile, as of mal_neural_memory_fwd
  mal_state tile_init;                 // what each tile gives to init, likewise
  float* rate;      // [B, T, H], of lr times how much the inner gradient is clipped
  float* momentum;  // [B, T, H]
  float* decay;
  float* k;     // [B, T, H, D]
  float* h;     // [B, T, H, E], of what the last layer is given: at depth 1 the keys
  float* d1;    // [B, T, H, E], of δ1; null at depth 1
  float* d2;    // [B, T, H, D]
  float* gain;  // [B, T, H, D], of the inner gradient of gain
};

// The gradients of the causal read, given what the write left before every tile.
struct mal_causal_read_bwd_args {
  mal_memory_call call;
  int64_t tiles;  // at least as many as all rows have
  mal_state tile_weights, tile_trace;
  const int64_t* first_tile;
  const void* d_output;  // [B, T, H, D] of dtype
  void* d_q;             // likewise
  mal_read_gradients to;
  void* stream;
};
MAL_API int mal_causal_read_bwd(const mal_causal_read_bwd_args*);

// The gradients of the write, and with those of the read of both; those of what is not given are
// null.
struct mal_write_bwd_args {
  mal_memory_call call;  // without q
  mal_state tile_weights, tile_trace;  // what the write left there
  const int64_t* first_tile;
  const float* d_surprise;  // [B, T, H]
  mal_state d_new_weights, d_new_trace;
  mal_state d_new_anchor;   // or nulls
  mal_read_gradients read;  // or nulls
  void* d_k;  // [B, T, H, D] of dtype
  void* d_v;
  float* d_lr;        // [B, T, H]
  float* d_momentum;  // as momentum; with chunk steps left as it is for rows without tokens
  float* d_decay;
  mal_state d_weights, d_trace;
  mal_state d_anchor;
  mal_state d_init;  // is added to
  void* stream;
};
MAL_API int mal_write_bwd(const mal_write_bwd_args*);

// The read of audio tokens into the host's hidden states, in place: see
// ops/aligned_residual_read.py. For at most 128 features a head; D and width are multiples of 8.
struct mal_aligned_residual_read_args {
  int64_t dtype;        // of hidden: MAL_FLOAT16 or MAL_BFLOAT16
  int64_t param_dtype;  // of norm and the matrices: MAL_FLOAT32 or that of hidden
  int64_t tokens, width, H, D, E;
  int64_t activation;  // as above
  int64_t splits;      // parts of a sum over width, 1 to 16
  int64_t blocks;      // at most, and all of them run at once: one for each multiprocessor
  void* hidden;        // [any, width]
  const int64_t* token_index;  // [tokens], rows of hidden
  const int64_t* state_index;  // [tokens], rows of weights
  const void* norm;    // [width]
  const void* w_q;     // [H D, width]
  const void* w_gate;  // [H D, width]
  const void* w_out;   // [width, H D]
  mal_state weights;
  float* z;        // scratch: [splits, tokens, 2 H D]
  float* squares;  // scratch: [splits, tokens]
  void* a;         // scratch: [tokens, H D] of dtype
  void* stream;
};
MAL_API int mal_aligned_residual_read(const mal_aligned_residual_read_args*);
