// The recurrence of momentum and decay for given updates, S = η S + u, W = a W + S, and backward.
//
// A task is a row, a head and a block of features: its numbers stay in registers or the first cache
// over all tokens. Limited by memory: it reads u and writes S and W once.
#include "gates.h"
#include "mal_cpu.h"
#include "memory.h"
#include "tokens.h"

namespace mal {
namespace {

constexpr long BLOCK = 256;

// The tokens of a row, and features [f, f + count) of one head.
struct Stripe {
  long begin, end, head, f, count, state;  // state: where it begins in [rows, H, F]
};

// f(stripe, scratch) of every stripe; scratch holds four blocks.
template <class Call, class F>
int each_stripe(const Call& c, int64_t threads, F f) {
  const long blocks = (c.F + BLOCK - 1) / BLOCK, tasks = c.rows * c.H * blocks;
  const int used = int(std::max<int64_t>(1, std::min<int64_t>(tasks, threads)));
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
  for (long task = 0; task < tasks; task++) {
    const FlushDenormals flush;
    const long g = task / blocks, row = g / c.H, first = task % blocks * BLOCK;
    Stripe s{c.cu_seqlens ? c.cu_seqlens[row] : row * c.T,
             c.cu_seqlens ? c.cu_seqlens[row + 1] : (row + 1) * c.T,
             g % c.H, first, std::min(BLOCK, c.F - first), g * c.F + first};
    float scratch[4 * BLOCK];
    f(s, scratch);
  }
  return MAL_CPU_DONE;
}

inline void start(const float* from, const Stripe& s, float* to) {
  if (from) memcpy(to, from + s.state, 4 * s.count);
  else memset(to, 0, 4 * s.count);
}

}  // namespace
}  // namespace mal

MAL_API int mal_cpu_momentum_scan_fwd(const mal_cpu_momentum_scan_fwd_args* args) {
  using namespace mal;
  const auto& c = args->scan;
  const long gates = (c.cu_seqlens ? c.T : c.rows * c.T) * c.H;
  if (!within(c.momentum, gates, 1) || !within(c.decay, gates, 1)) return MAL_CPU_GATES;
  return each_stripe(c, args->threads, [&](const Stripe& s, float* scratch) {
    float *W = scratch, *S = W + BLOCK, *u = S + BLOCK;
    start(c.weights0, s, W);
    start(c.trace0, s, S);
    for (long t = s.begin; t < s.end; t++) {
      const long gate = t * c.H + s.head, at = gate * c.F + s.f;
      const float eta = c.momentum ? c.momentum[gate] : 0, a = 1 - (c.decay ? c.decay[gate] : 0);
      pack(c.dtype, c.update, at, 0, 1, s.count, u, BLOCK);
      for (long i = 0; i < s.count; i++) {
        S[i] = eta * S[i] + u[i];
        W[i] = a * W[i] + S[i];
      }
      memcpy(c.trace + at, S, 4 * s.count);
      memcpy(c.weights + at, W, 4 * s.count);
    }
  });
}

// From the last token on: dS = dS' + dW with dW = d_weights + a' dW', dS' = d_trace + η' dS, where '
// is the token after; dη = <dS, S before>, da = <dW, W before>.
MAL_API int mal_cpu_momentum_scan_bwd(const mal_cpu_momentum_scan_bwd_args* args) {
  using namespace mal;
  const auto& c = args->scan;
  return each_stripe(c, args->threads, [&](const Stripe& s, float* scratch) {
    float *dW = scratch, *dS = dW + BLOCK, *W0 = dS + BLOCK, *S0 = W0 + BLOCK;
    memset(dW, 0, 4 * BLOCK), memset(dS, 0, 4 * BLOCK);
    start(c.weights0, s, W0);
    start(c.trace0, s, S0);
    const long block = s.f / BLOCK;
    for (long t = s.end - 1; t >= s.begin; t--) {
      const long gate = t * c.H + s.head, at = gate * c.F + s.f, before = at - c.H * c.F;
      const float eta = c.momentum ? c.momentum[gate] : 0, a = 1 - (c.decay ? c.decay[gate] : 0);
      const float* W = t > s.begin ? c.weights + before : W0;
      const float* S = t > s.begin ? c.trace + before : S0;
      float of_eta = 0, of_a = 0;
#pragma omp simd reduction(+ : of_eta, of_a)
      for (long i = 0; i < s.count; i++) {
        dW[i] += c.d_weights[at + i];
        dS[i] += c.d_trace[at + i] + dW[i];
        of_eta += dS[i] * S[i];
        of_a += dW[i] * W[i];
      }
      unpack(c.dtype, dS, BLOCK, 1, s.count, c.d_update, at, 0);
      const long partial = block * c.tokens * c.H + gate;
      if (c.d_momentum) c.d_momentum[partial] = of_eta;
      if (c.d_decay) c.d_decay[partial] = -of_a;
      for (long i = 0; i < s.count; i++) dW[i] *= a, dS[i] *= eta;
    }
    if (c.d_weights0) memcpy(c.d_weights0 + s.state, dW, 4 * s.count);
    if (c.d_trace0) memcpy(c.d_trace0 + s.state, dS, 4 * s.count);
  });
}
