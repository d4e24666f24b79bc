// The read of a turn: RMSNorm, two projections, the read at each token's state, the gate, a third
// projection and the residual, for N tokens of hidden states. Rows of scratch are tokens, sorted by
// state.
#include "memory_read.h"

namespace mal {
namespace {

constexpr long COLUMNS = 64, DEPTH = 256;  // of a block of a projection's matrix
constexpr float RMS_NORM_EPS = 1e-6f, NORMALIZE_EPS = 1e-12f;

// Runs f(i, arena) for i below `count`; returns 0, or why nothing was computed.
template <class F>
int each(long count, int64_t threads, F f) {
  mal_memory_call tasks{};
  tasks.rows = count, tasks.H = 1;
  return each_task(tasks, threads, f);
}

// Columns [first, first + n) of x Wᵀ, with x [N, in] and W [out, in], into `to` [N, COLUMNS].
void project(long N, long in, const float* x, const float* W, long first, long n, float* to,
             Arena& arena) {
  float *block = arena.take(COLUMNS, DEPTH), *turned = arena.take(DEPTH, COLUMNS);
  for (long k = 0; k < in; k += DEPTH) {
    const long depth = std::min(DEPTH, in - k);
    for (long j = 0; j < n; j++) memcpy(block + j * DEPTH, W + (first + j) * in + k, 4 * depth);
    transpose(padded(n), padded(depth), block, DEPTH, turned, COLUMNS);
    const auto multiply = k ? add_product : product;
    multiply(N, padded(n), depth, rows_of(x + k, in), turned, COLUMNS, to, COLUMNS, NONE);
  }
}

// Scratch of a call: [N, Dm], [N, H D].
struct Rows {
  std::vector<int64_t> token, cu_seqlens;
  std::vector<float> x, normed, q, gate;

  explicit Rows(const mal_cpu_aligned_residual_read_fwd_args& c)
      : token(c.N), cu_seqlens(c.read.rows + 1), x(c.N * c.Dm), normed(c.N * c.Dm),
        q(c.N * c.read.H * c.read.D), gate(c.N * c.read.H * c.read.D) {
    for (long i = 0; i < c.N; i++) cu_seqlens[c.state_index[i] + 1]++;
    for (long r = 0; r < c.read.rows; r++) cu_seqlens[r + 1] += cu_seqlens[r];
    std::vector<int64_t> next(cu_seqlens.begin(), cu_seqlens.end() - 1);
    for (long i = 0; i < c.N; i++) token[next[c.state_index[i]]++] = c.token_index[i];
  }
};

// Whether every index is in its range, and no token named twice.
bool places_fit(const mal_cpu_aligned_residual_read_fwd_args& c) {
  std::vector<bool> seen(c.positions);
  for (long i = 0; i < c.N; i++) {
    const int64_t token = c.token_index[i], state = c.state_index[i];
    if (token < 0 || token >= c.positions || seen[token]) return false;
    if (state < 0 || state >= c.read.rows) return false;
    seen[token] = true;
  }
  return true;
}

void normalise_row(const mal_cpu_aligned_residual_read_fwd_args& c, Rows& r, long i) {
  float *x = &r.x[i * c.Dm], *normed = &r.normed[i * c.Dm], square = 0;
  pack(c.dtype, c.hidden, r.token[i] * c.Dm, 0, 1, c.Dm, x, c.Dm);
#pragma omp simd reduction(+ : square)
  for (long m = 0; m < c.Dm; m++) square += x[m] * x[m];
  const float scale = 1 / sqrtf(square / c.Dm + RMS_NORM_EPS);
  for (long m = 0; m < c.Dm; m++) normed[m] = x[m] * scale * c.norm[m];
}

// Columns of the queries or of the gate.
void project_in(const mal_cpu_aligned_residual_read_fwd_args& c, Rows& r, long task, Arena& arena) {
  const long inner = c.read.H * c.read.D, blocks = (inner + COLUMNS - 1) / COLUMNS;
  const bool of_gate = task >= blocks;
  const long first = task % blocks * COLUMNS, n = std::min(COLUMNS, inner - first);
  float* found = arena.take(c.N, COLUMNS);
  project(c.N, c.Dm, r.normed.data(), of_gate ? c.w_gate : c.w_q, first, n, found, arena);
  for (long i = 0; i < c.N; i++)
    memcpy((of_gate ? r.gate : r.q).data() + i * inner + first, found + i * COLUMNS, 4 * n);
}

// Per head on the unit sphere, then the read in its place, then the gate: q becomes y ⊙ silu(gate).
void read_head(const mal_memory_call& call, const Shape& shape, Rows& r, long g, Arena& arena) {
  const Task task(call, shape, g);
  const long D = shape.D;
  for (long t = 0; t < task.tokens; t++) {
    float *q = &r.q[task.token(t) * D], square = 0;
#pragma omp simd reduction(+ : square)
    for (long d = 0; d < D; d++) square += q[d] * q[d];
    const float scale = 1 / std::max(sqrtf(square), NORMALIZE_EPS);
    for (long d = 0; d < D; d++) q[d] *= scale;
  }
  memory_read_fwd(task, arena, r.q.data());
  float *y = arena.take(1, padded(D)), *gate = arena.take(1, padded(D));
  for (long t = 0; t < task.tokens; t++) {
    float* q = &r.q[task.token(t) * D];
    memcpy(y, q, 4 * D);
    memcpy(gate, &r.gate[task.token(t) * D], 4 * D);
    activate(SILU, padded(D), gate, gate, nullptr, nullptr);
    for (long d = 0; d < D; d += VL) store(y + d, load(y + d) * load(gate + d));
    memcpy(q, y, 4 * D);
  }
}

void project_out(const mal_cpu_aligned_residual_read_fwd_args& c, Rows& r, long task, Arena& arena) {
  const long first = task * COLUMNS, n = std::min(COLUMNS, c.Dm - first);
  float* found = arena.take(c.N, COLUMNS);
  project(c.N, c.read.H * c.read.D, r.q.data(), c.w_out, first, n, found, arena);
  for (long i = 0; i < c.N; i++) {
    float* row = found + i * COLUMNS;
    for (long j = 0; j < n; j++) row[j] += r.x[i * c.Dm + first + j];
    unpack(c.dtype, row, COLUMNS, 1, n, c.output, r.token[i] * c.Dm + first, 0);
  }
}

}  // namespace
}  // namespace mal

MAL_API int mal_cpu_aligned_residual_read_fwd(const mal_cpu_aligned_residual_read_fwd_args* args) try {
  using namespace mal;
  const auto& c = *args;
  if (!places_fit(c)) return MAL_CPU_PLACES;
  Rows r(c);
  mal_memory_call call = as_chunk_steps(c.read);
  call.q = r.q.data(), call.cu_seqlens = r.cu_seqlens.data();
  const Shape shape(call);
  const auto blocks = [](long columns) { return (columns + COLUMNS - 1) / COLUMNS; };
  const int threads = int(c.read.threads);
  return each(c.N, threads, [&](long i, Arena&) { normalise_row(c, r, i); }) ||
         each(2 * blocks(call.H * call.D), threads,
              [&](long task, Arena& arena) { project_in(c, r, task, arena); }) ||
         each(call.rows * call.H, threads,
              [&](long g, Arena& arena) { read_head(call, shape, r, g, arena); }) ||
         each(blocks(c.Dm), threads,
              [&](long task, Arena& arena) { project_out(c, r, task, arena); });
} catch (const std::bad_alloc&) {
  return MAL_CPU_MEMORY;
}
