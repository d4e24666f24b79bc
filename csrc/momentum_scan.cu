// S_t = η_t S_{t-1} + u_t,  W_t = (1 - α_t) W_{t-1} + S_t, and the gradients; any number of features.
//
// Both directions are one recurrence of a pair (x, y) with gates (p, q) and inputs (u, v):
//     x_t = p_t x_{t-1} + u_t       y_t = q_t y_{t-1} + x_t + v_t
// Forward in time: x = S, y = W, p = η, q = 1 - α, v = 0. Backward: x = λ, the gradient of W, and
// y = μ, that of S, with p = 1 - α, q = η of the token after, u = dW, v = dS. A segment of tokens
// maps (x, y) to (ε x + u', f x + β y + v'), which is how the groups of a block (momentum_scan.h)
// are joined. Everything is read and written once; the order of every sum is fixed.
#include "momentum_scan.h"

#include "device.cuh"

namespace mal::scan {
namespace {

// tokens that a thread takes of every tile: as many as its registers hold
constexpr int kTokensForward = 8, kTokensBackward = 4;

// A segment's map, but for u' and v', which are different for each feature.
struct Gates {
  float epsilon = 1, f = 0, beta = 1;

  MAL_DEVICE void then(float p, float q) {
    epsilon *= p;
    f = q * f + epsilon;
    beta *= q;
  }
};

struct Pair {
  float x[kFeatures] = {}, y[kFeatures] = {};

  MAL_DEVICE void then(float p, float q, const float* u, const float* v) {
#pragma unroll
    for (int j = 0; j < kFeatures; j++) {
      x[j] = p * x[j] + u[j];
      y[j] = q * y[j] + x[j] + v[j];
    }
  }
};

struct Shared {
  Gates gates[kThreads / 4];     // of every group
  Pair ends[kThreads];           // where each thread's tokens lead from zero
  float sums[kThreads / 32][2 * kTokensBackward];  // of every warp
};

// This thread's place in the grid, and its row of tokens.
struct Thread {
  int lane, step, lanes, steps;
  int64_t row, head, block, feature;
  int64_t begin, length;

  template <class Arguments>
  MAL_DEVICE explicit Thread(const Arguments& a) {
    Shape shape = shape_of(a.F);
    Place place = place_of(blockIdx.x, shape.blocks, a.H);
    row = place.row, head = place.head, block = place.block;
    lanes = shape.lanes, steps = shape.steps;
    lane = threadIdx.x % lanes, step = threadIdx.x / lanes;
    feature = (block * lanes + lane) * kFeatures;
    begin = a.cu_seqlens ? a.cu_seqlens[row] : row * a.T;
    length = a.cu_seqlens ? a.cu_seqlens[row + 1] - begin : a.T;
  }
};

// Whether all pointers and rows begin at multiples of 16 bytes.
template <class... Pointers>
MAL_DEVICE bool are_aligned(int64_t F, Pointers... pointers) {
  return F % kFeatures == 0 && ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

MAL_DEVICE bool is_aligned(const mal_momentum_scan_fwd_args& a) {
  return are_aligned(a.F, a.update, a.weights0, a.trace0, a.weights, a.trace);
}

MAL_DEVICE bool is_aligned(const mal_momentum_scan_bwd_args& a) {
  return are_aligned(a.F, a.d_weights, a.d_trace, a.weights, a.trace, a.weights0, a.trace0,
                     a.d_update, a.d_weights0, a.d_trace0);
}

// Loads and stores kFeatures numbers at a time, or one by one where F or a pointer does not allow
// it; those beyond F are read as zero.
struct Memory {
  int64_t F;
  bool is_aligned;

  template <class T>
  MAL_DEVICE void load(float (&to)[kFeatures], const T* from, int64_t feature, bool exists) const {
#pragma unroll
    for (int j = 0; j < kFeatures; j++) to[j] = 0;
    if (!exists || !from || feature >= F) return;
    if (is_aligned) {
      auto all = *reinterpret_cast<const Vector<T, kFeatures>*>(from + feature);
#pragma unroll
      for (int j = 0; j < kFeatures; j++) to[j] = to_float(all.at[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kFeatures; j++)
        if (feature + j < F) to[j] = to_float(from[feature + j]);
    }
  }

  template <class T>
  MAL_DEVICE void store(T* to, const float (&from)[kFeatures], int64_t feature, bool exists) const {
    if (!exists || feature >= F) return;
    if (is_aligned) {
      Vector<T, kFeatures> all;
#pragma unroll
      for (int j = 0; j < kFeatures; j++) all.at[j] = from_float<T>(from[j]);
      *reinterpret_cast<Vector<T, kFeatures>*>(to + feature) = all;
    } else {
#pragma unroll
      for (int j = 0; j < kFeatures; j++)
        if (feature + j < F) to[feature + j] = from_float<T>(from[j]);
    }
  }
};

// `carry` before this thread's tokens, from `end` and `gates`, where they lead from zero; `after`
// becomes what the whole tile leads to.
MAL_DEVICE Pair join(const Thread& t, const Pair& end, const Gates& gates, Pair& after) {
  Shared& shared = *mal::shared<Shared>();
  __syncthreads();  // the last tile's have been read
  shared.ends[threadIdx.x] = end;
  if (t.lane == 0) shared.gates[t.step] = gates;
  __syncthreads();
  Pair before;
  for (int step = 0; step < t.steps; step++) {
    if (step == t.step) before = after;
    Gates g = shared.gates[step];
    const Pair& reached = shared.ends[step * t.lanes + t.lane];
#pragma unroll
    for (int j = 0; j < kFeatures; j++) {
      after.y[j] = g.beta * after.y[j] + g.f * after.x[j] + reached.y[j];
      after.x[j] = g.epsilon * after.x[j] + reached.x[j];
    }
  }
  return before;
}

template <class T>
MAL_KERNEL(kThreads, 4) forward(mal_momentum_scan_fwd_args a) {
  constexpr int kTokens = kTokensForward;
  const Thread t(a);
  const Memory memory{a.F, is_aligned(a)};
  const float nothing[kFeatures] = {};
  int64_t state = (t.row * a.H + t.head) * a.F;
  Pair carry;
  memory.load(carry.y, a.weights0 ? a.weights0 + state : nullptr, t.feature, true);
  memory.load(carry.x, a.trace0 ? a.trace0 + state : nullptr, t.feature, true);
  for (int64_t tile = 0; tile < t.length; tile += kTokens * t.steps) {
    float u[kTokens][kFeatures], p[kTokens], q[kTokens];
    int64_t first = token_of(tile, t.step, 0, kTokens);
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      bool exists = first + i < t.length;
      int64_t gate = (t.begin + first + i) * a.H + t.head;
      auto update = static_cast<const T*>(a.update);
      memory.load(u[i], update + gate * a.F, t.feature, exists);
      p[i] = exists && a.momentum ? a.momentum[gate] : 0;
      q[i] = exists && a.decay ? 1 - a.decay[gate] : 1;
    }
    Pair now = carry;
    if (t.steps > 1) {
      Pair end;
      Gates gates;
#pragma unroll
      for (int i = 0; i < kTokens; i++) {
        end.then(p[i], q[i], u[i], nothing);
        gates.then(p[i], q[i]);
      }
      now = join(t, end, gates, carry);
    }
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      bool exists = first + i < t.length;
      int64_t at = ((t.begin + first + i) * a.H + t.head) * a.F;
      now.then(p[i], q[i], u[i], nothing);
      memory.store(a.trace + at, now.x, t.feature, exists);
      memory.store(a.weights + at, now.y, t.feature, exists);
    }
    if (t.steps == 1) carry = now;
  }
}

// Σ over the lanes of a group, known to its first lane.
template <int kCount>
MAL_DEVICE void sum_over_lanes(const Thread& t, float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++)
    for (int mask = min(t.lanes, 32) / 2; mask; mask /= 2)
      sums[i] += __shfl_xor_sync(~0u, sums[i], mask);
  if (t.lanes <= 32) return;
  Shared& shared = *mal::shared<Shared>();
  int warp = threadIdx.x / 32, warps = t.lanes / 32;
  __syncthreads();  // the last tile's have been read
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < kCount; i++) shared.sums[warp][i] = sums[i];
  __syncthreads();
  if (t.lane) return;
#pragma unroll
  for (int i = 0; i < kCount; i++)
    for (int w = 1; w < warps; w++) sums[i] += shared.sums[t.step * warps + w][i];
}

// ⟨a, b⟩ over this thread's features.
MAL_DEVICE float dot(const float (&a)[kFeatures], const float (&b)[kFeatures]) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kFeatures; j++) sum += a[j] * b[j];
  return sum;
}

template <class T>
MAL_KERNEL(kThreads, 3) backward(mal_momentum_scan_bwd_args a) {
  constexpr int kTokens = kTokensBackward;
  const Thread t(a);
  const Memory memory{a.F, is_aligned(a)};
  int64_t state = (t.row * a.H + t.head) * a.F;
  int64_t partial = t.block * a.tokens * a.H;
  Pair carry;  // λ and μ
  for (int64_t tile = 0; tile < t.length; tile += kTokens * t.steps) {
    float u[kTokens][kFeatures], v[kTokens][kFeatures], p[kTokens], q[kTokens];
    int64_t last = t.length - 1 - token_of(tile, t.step, 0, kTokens);
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      bool exists = last - i >= 0, has_next = exists && last - i + 1 < t.length;
      int64_t gate = (t.begin + last - i) * a.H + t.head;
      memory.load(u[i], a.d_weights + gate * a.F, t.feature, exists);
      memory.load(v[i], a.d_trace + gate * a.F, t.feature, exists);
      p[i] = has_next && a.decay ? 1 - a.decay[gate + a.H] : 1;
      q[i] = has_next && a.momentum ? a.momentum[gate + a.H] : 0;
    }
    Pair now = carry;
    if (t.steps > 1) {
      Pair end;
      Gates gates;
#pragma unroll
      for (int i = 0; i < kTokens; i++) {
        if (last - i < 0) break;  // before the row's first token: the carry is wanted there
        end.then(p[i], q[i], u[i], v[i]);
        gates.then(p[i], q[i]);
      }
      now = join(t, end, gates, carry);
    }
    float sums[2 * kTokens];  // dη and dα
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      int64_t token = last - i, at = ((t.begin + token) * a.H + t.head) * a.F;
      bool exists = token >= 0, is_first = token <= 0;
      if (exists) now.then(p[i], q[i], u[i], v[i]);
      memory.store(static_cast<T*>(a.d_update) + at, now.y, t.feature, exists);
      float w[kFeatures], s[kFeatures];  // before the token
      int64_t before = is_first ? state : at - a.H * a.F;
      exists &= !is_first || a.weights0;
      memory.load(w, (is_first ? a.weights0 : a.weights) + before, t.feature, exists);
      memory.load(s, (is_first ? a.trace0 : a.trace) + before, t.feature, exists);
      sums[2 * i] = dot(now.y, s);
      sums[2 * i + 1] = -dot(now.x, w);
    }
    sum_over_lanes(t, sums);
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      int64_t gate = (t.begin + last - i) * a.H + t.head;
      if (t.lane || last - i < 0) continue;
      if (a.d_momentum) a.d_momentum[partial + gate] = sums[2 * i];
      if (a.d_decay) a.d_decay[partial + gate] = sums[2 * i + 1];
    }
    if (t.steps == 1) carry = now;
  }
  if (!a.d_weights0 || t.step) return;
  int64_t gate = t.begin * a.H + t.head;
  float p = t.length && a.decay ? 1 - a.decay[gate] : 1;
  float q = t.length && a.momentum ? a.momentum[gate] : 0;
#pragma unroll
  for (int j = 0; j < kFeatures; j++) carry.x[j] *= p, carry.y[j] *= q;
  memory.store(a.d_weights0 + state, carry.x, t.feature, true);
  memory.store(a.d_trace0 + state, carry.y, t.feature, true);
}

template <class Arguments>
int start(const Arguments& a, void (*const (&kernels)[3])(Arguments)) {
  Shape shape = shape_of(a.F);
  int64_t blocks = shape.blocks * a.H * a.rows;
  if (a.dtype < 0 || a.dtype > 2 || blocks > INT32_MAX) return kInvalidArgument;
  dim3 grid = {static_cast<unsigned>(blocks), 1, 1};
  return launch(kernels[a.dtype], grid, {kThreads, 1, 1}, sizeof(Shared), 1, a.stream, a);
}

}  // namespace
}  // namespace mal::scan

MAL_API int mal_momentum_scan_fwd(const mal_momentum_scan_fwd_args* a) {
  using namespace mal::scan;
  return start(*a, {forward<float>, forward<mal::fp16>, forward<mal::bf16>});
}

MAL_API int mal_momentum_scan_bwd(const mal_momentum_scan_bwd_args* a) {
  using namespace mal::scan;
  return start(*a, {backward<float>, backward<mal::fp16>, backward<mal::bf16>});
}
