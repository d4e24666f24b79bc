// The read of a turn: from host hidden states to host hidden states, in one launch of three stages.
//
//     project   z_q, z_g = (x ⊙ norm) (W_q, W_gate)ᵀ, and ‖x‖²        64 tokens × 64 columns × split
//     read      a = M(q; W) ⊙ silu(z_g / rms), q = z_q / ‖z_q‖         16 tokens × head
//     add       hidden[token] += a W_outᵀ                              64 tokens × 64 columns
//
// A turn is small: 112 tokens, Dm = 4096 and H D = 256 are 0.7 GFLOP on 12 MB of float32 parameters.
// What takes the time is to fetch these once through as many SMs as there are, and to start:
//   * Of the projections' 2 H D columns there are 8 tiles a tile of tokens, too few for 132 SMs. So
//     the sum over Dm is split, to as many parts as the caller finds best. The parts stand in memory
//     and the next stage sums them, always in the same order: no atomics, the same bits every time.
//   * x is what is copied, unchanged. norm is multiplied into the weights, whose product is rounded
//     once; 1 / rms, which all of Dm is needed for, comes last: z is linear in it.
//   * Blocks stay (one an SM) and wait for each other twice. Three launches would wait as often, for
//     grids to end and start, be three times the host's work, and each begin with cold loads. Here a
//     block that has nothing left to project first sends for what it needs next: its part of the
//     memory to L2, and the first slabs of W_out to shared memory. Blocks that wait for each other
//     must all run at once; hence a cooperative launch.
//   * Slabs of operands are copied asynchronously, some ahead of the one that is multiplied: about
//     50 KB an SM are on their way. The memory's weights, of which no number is used by two warps of
//     a block, go to registers directly.
// No clusters, and no more shared memory than any GPU since sm_80 has: one source serves all. None
// of this has been measured: what it rests on is counted above.
#include "aligned_residual_read.h"

#include "block.cuh"

namespace mal::aligned {
namespace {

constexpr float kRmsNormEpsilon = 1e-6f, kSmallestLength = 1e-12f;

// T: tokens. P: parameters, float32 or T.
template <class T, class P>
struct Shared {
  static constexpr int kSlabs = sizeof(P) == 4 ? 3 : 4;  // being copied or multiplied
  struct Slab {
    T a[kRows][kDepth + kPad];
    P b[kColumns][kDepth + kPad];
    P factor[kDepth];  // of b's columns
  } slabs[kSlabs];
  T q[kTokens][kFeatures + kPad];
  T h[kTokens][kUnits + kPad];
  float o[kTokens][kFeatures + 4];
  int64_t state[kTokens];  // -1: there is no token
};

// Two numbers, rounded.
template <class T>
MAL_DEVICE uint32_t packed(float low, float high) {
  union {
    T at[2];
    uint32_t bits;
  } x = {{from_float<T>(low), from_float<T>(high)}};
  return x.bits;
}

MAL_DEVICE float silu(float x) { return x / (1 + expf(-x)); }

template <class T, class P>
struct Read {
  static constexpr int kSlabs = Shared<T, P>::kSlabs;
  static constexpr int kOfT = 16 / sizeof(T), kOfP = 16 / sizeof(P);  // numbers in 16 bytes
  static constexpr int kCopiesA = kRows * kDepth / kOfT / kThreads;
  static constexpr int kCopiesB = kColumns * kDepth / kOfP / kThreads;
  static constexpr int kShare = kFeatures / kSharing;
  static constexpr int kOfUnits = kUnits / 8 / kWarps, kOfFeatures = kFeatures / 8 / kWarps;

  const mal_aligned_residual_read_args& a;
  Shared<T, P>& s = *mal::shared<Shared<T, P>>();
  const int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int dim = a.D, hidden = a.E, inner = a.H * a.D, splits = a.splits;
  const int tiles = tiles_of(a.tokens, kRows), groups = tiles_of(a.tokens, kTokens);
  const Stages stages = stages_of(a.tokens, a.width, a.H, a.D, a.splits);

  MAL_DEVICE explicit Read(const mal_aligned_residual_read_args& arguments) : a(arguments) {}

  MAL_DEVICE void run() {
    const int block = blockIdx.x, blocks = gridDim.x;
    const int64_t state = block < stages.reads ? first_state(block) : 0;
    for (int i = block; i < stages.projections; i += blocks) project(i);
    if (block < stages.reads) warm(state, block);
    if (block < stages.additions) begin(operands_of_addition(item_of_addition(block)));
    grid_sync();  // z
    for (int i = block; i < stages.reads; i += blocks) read(i);
    grid_sync();  // a
    for (int i = block; i < stages.additions; i += blocks) add(i, i == block);
  }

  // --- the projections -------------------------------------------------------------------------

  // A product a bᵀ of `rows` and `columns` rows that are `depth` numbers long, as this thread copies
  // them: null beyond the last.
  struct Operands {
    const T* a[kCopiesA];
    const P* b[kCopiesB];
    const P* factor;  // or null
    int rows, columns, depth;
  };

  template <int kCount, class Number, class RowOf>
  MAL_DEVICE void set_rows(const Number* (&rows)[kCount], int count, RowOf row_of) const {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      Place p = copy_of(thread, i, 16 / sizeof(Number));
      rows[i] = p.row < count ? row_of(p.row) + p.column : nullptr;
    }
  }

  template <int kCount, class Number, int kPitch>
  MAL_DEVICE void fetch(Number (*to)[kPitch], const Number* const (&rows)[kCount], int slab,
                        int depth) const {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      Place p = copy_of(thread, i, 16 / sizeof(Number));
      int at = slab * kDepth;
      bool exists = rows[i] && at + p.column < depth;
      const void* from = a.hidden;
      copy_async(&to[p.row][p.column], exists ? rows[i] + at : from, exists);
    }
  }

  MAL_DEVICE void fetch_a(const Operands& o, int slab) {
    if (slab * kDepth < o.depth) fetch(s.slabs[slab % kSlabs].a, o.a, slab, o.depth);
  }

  MAL_DEVICE void fetch_b(const Operands& o, int slab) {
    int at = slab * kDepth + thread * kOfP;
    if (slab * kDepth >= o.depth) return;
    auto& to = s.slabs[slab % kSlabs];
    fetch(to.b, o.b, slab, o.depth);
    if (!o.factor || thread >= kDepth / kOfP) return;
    bool exists = at < o.depth;
    copy_async(&to.factor[thread * kOfP], o.factor + (exists ? at : 0), exists);
  }

  // Starts a product with what needs nothing but the parameters: its first slabs of b.
  MAL_DEVICE void begin(const Operands& o) {
    __syncthreads();  // the last product's slabs have been read
#pragma unroll 1
    for (int slab = 0; slab < kSlabs - 1; slab++) fetch_b(o, slab);
  }

  // sum += a bᵀ of a tile, after begin(). `visit` sees every slab of a.
  template <bool kScaled, class Visit>
  MAL_DEVICE void multiply(float (&sum)[2][2][4], const Operands& o, Visit visit) {
#pragma unroll 1
    for (int slab = 0; slab < kSlabs - 1; slab++) {
      fetch_a(o, slab);
      copy_commit();
    }
#pragma unroll 1
    for (int slab = 0; slab * kDepth < o.depth; slab++) {
      copy_wait<kSlabs - 2>();
      __syncthreads();  // the slab is there; the one before has been read
      fetch_b(o, slab + kSlabs - 1);
      fetch_a(o, slab + kSlabs - 1);
      copy_commit();
      visit(s.slabs[slab % kSlabs].a);
      const Place part = part_of(warp);
      if (part.row < o.rows && part.column < o.columns)
        multiply_slab<kScaled>(sum, s.slabs[slab % kSlabs]);
    }
  }

  template <bool kScaled>
  MAL_DEVICE void multiply_slab(float (&sum)[2][2][4],
                                const typename Shared<T, P>::Slab& slab) const {
    const Place part = part_of(warp), pair = pair_of(lane);
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t fa[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) memory::load(fa[m], slab.a, part.row + 16 * m, k, true, false);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        uint32_t fb[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int column = k + 8 * i + pair.column;
          float low, high;
          load_pair(low, high, &slab.b[part.column + 8 * n + pair.row][column]);
          if (kScaled) {
            float of_low, of_high;
            load_pair(of_low, of_high, &slab.factor[column]);
            low *= of_low, high *= of_high;
          }
          fb[i] = packed<T>(low, high);
        }
#pragma unroll
        for (int m = 0; m < 2; m++) mma(sum[m][n], fa[m], fb, T());
      }
    }
  }

  MAL_DEVICE static void load_pair(float& low, float& high, const P* from) {
    auto pair = *reinterpret_cast<const Vector<P, 2>*>(from);
    low = to_float(pair.at[0]), high = to_float(pair.at[1]);
  }

  // Calls `each` with row, column and value of every two numbers of a tile that this thread has.
  template <class Each>
  MAL_DEVICE void each_pair(float (&sum)[2][2][4], const Operands& o, Each each) const {
    const Place part = part_of(warp);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          Place p = memory::accumulator_of(lane, i);
          int row = part.row + 16 * m + p.row, column = part.column + 8 * n + p.column;
          if (row < o.rows && column < o.columns) each(row, column, sum[m][n][i], sum[m][n][i + 1]);
        }
  }

  MAL_DEVICE T* hidden_of(int64_t token) const {
    return static_cast<T*>(a.hidden) + a.token_index[token] * a.width;
  }

  // A part of z_q or z_g; with the first of its columns also one of ‖x‖².
  MAL_DEVICE void project(int index) {
    const int columns = tiles_of(inner, kColumns), slabs = tiles_of(a.width, kDepth);
    const Item item = item_of(index, tiles, 2 * columns);
    const int matrix = item.column >= columns;
    const int column = (item.column - matrix * columns) * kColumns;
    const int from = first_slab(item.split, splits, slabs) * kDepth;
    const int to = first_slab(item.split + 1, splits, slabs) * kDepth;
    const int64_t token = int64_t{item.tile} * kRows;
    auto weights = static_cast<const P*>(matrix ? a.w_gate : a.w_q) + column * a.width + from;
    Operands o;
    o.rows = min(int64_t{kRows}, a.tokens - token);
    o.columns = min(kColumns, inner - column);
    o.depth = min(int64_t{to}, a.width) - from;
    o.factor = static_cast<const P*>(a.norm) + from;
    set_rows(o.b, o.columns, [&](int row) { return weights + row * a.width; });
    begin(o);
    set_rows(o.a, o.rows, [&](int row) { return hidden_of(token + row) + from; });
    float sum[2][2][4] = {}, square = 0;
    multiply<true>(sum, o, [&](const T(*x)[kDepth + kPad]) {
      if (item.column) return;
#pragma unroll
      for (int i = 0; i < kDepth / 4; i++) {
        float number = to_float(x[thread / 4][4 * i + thread % 4]);
        square += number * number;
      }
    });
    each_pair(sum, o, [&](int row, int at, float low, float high) {
      float* z = z_of(item.split, token + row) + matrix * inner + column + at;
      *reinterpret_cast<Vector<float, 2>*>(z) = {low, high};
    });
    if (item.column) return;
#pragma unroll
    for (int mask = 2; mask; mask /= 2) square += __shfl_xor_sync(~0u, square, mask);
    if (thread % 4 == 0 && token + thread / 4 < a.tokens)
      a.squares[item.split * a.tokens + token + thread / 4] = square;
  }

  MAL_DEVICE float* z_of(int split, int64_t token) const {
    return a.z + (split * a.tokens + token) * 2 * inner;
  }

  MAL_DEVICE Item item_of_addition(int index) const {
    return item_of(index, tiles, tiles_of(a.width, kColumns));
  }

  MAL_DEVICE Operands operands_of_addition(const Item& item) const {
    const int64_t token = int64_t{item.tile} * kRows, column = int64_t{item.column} * kColumns;
    auto values = static_cast<const T*>(a.a) + token * inner;
    auto weights = static_cast<const P*>(a.w_out) + column * inner;
    Operands o;
    o.rows = min(int64_t{kRows}, a.tokens - token);
    o.columns = min(int64_t{kColumns}, a.width - column);
    o.depth = inner;
    o.factor = nullptr;
    set_rows(o.a, o.rows, [&](int row) { return values + row * inner; });
    set_rows(o.b, o.columns, [&](int row) { return weights + row * inner; });
    return o;
  }

  MAL_DEVICE void add(int index, bool has_begun) {
    const Item item = item_of_addition(index);
    const int64_t token = int64_t{item.tile} * kRows, column = int64_t{item.column} * kColumns;
    const Operands o = operands_of_addition(item);
    if (!has_begun) begin(o);
    auto pair_at = [&](int row, int at) {
      return reinterpret_cast<Vector<T, 2>*>(hidden_of(token + row) + column + at);
    };
    float sum[2][2][4] = {};
    each_pair(sum, o, [&](int row, int at, float& low, float& high) {
      Vector<T, 2> x = *pair_at(row, at);
      low = to_float(x.at[0]), high = to_float(x.at[1]);
    });
    multiply<false>(sum, o, [](const T(*)[kDepth + kPad]) {});
    each_pair(sum, o, [&](int row, int at, float low, float high) {
      *pair_at(row, at) = {from_float<T>(low), from_float<T>(high)};
    });
  }

  // --- the memory ------------------------------------------------------------------------------

  MAL_DEVICE int64_t first_state(int index) const {
    return a.state_index[int64_t{item_of(index, groups, a.H).tile} * kTokens];
  }

  // Sends for what an item will read of the memory, to L2.
  MAL_DEVICE void warm(int64_t state, int index) const {
    const int64_t at = (state * a.H + item_of(index, groups, a.H).column) * dim * hidden;
    for (int i = 32 * thread; i < dim * hidden; i += 32 * kThreads) {
      if (a.weights.first) prefetch(a.weights.first + at + i);
      prefetch(a.weights.last + at + i);
    }
  }

  MAL_DEVICE void read(int index) {
    const Item item = item_of(index, groups, a.H);
    const int head = item.column;
    const int64_t first = int64_t{item.tile} * kTokens, t = first + thread / kSharing;
    float q[kShare], gate[kShare], y[kShare] = {};
    int64_t state = -1;
    if (thread < kTokens && first + thread < a.tokens) state = a.state_index[first + thread];
    load_query(q, gate, t, head);
    __syncthreads();  // what the last item left in shared memory has been read
    if (thread < kTokens) s.state[thread] = state;
    store_query(q);
    __syncthreads();  // q and the states
    for (int i = 0; i < kTokens; i++) {
      if (!is_first(i)) continue;
      float o[kShare];
      network(s.state[i], head);
      __syncthreads();  // o
      load_output(o, q, s.state[i], head);
      if (s.state[thread / kSharing] == s.state[i])
#pragma unroll
        for (int j = 0; j < kShare; j++) y[j] = o[j];
      __syncthreads();  // o has been read
    }
    if (t >= a.tokens) return;
#pragma unroll
    for (int i = 0; i < kShare; i += 4) {
      int feature = share_of(thread, i).column;
      if (feature >= dim) continue;
      T* to = static_cast<T*>(a.a) + t * inner + head * dim + feature;
      store_four(to, y[i] * gate[i], y[i + 1] * gate[i + 1], y[i + 2] * gate[i + 2],
                 y[i + 3] * gate[i + 3]);
    }
  }

  MAL_DEVICE static void store_four(T* to, float x0, float x1, float x2, float x3) {
    *reinterpret_cast<Vector<T, 4>*>(to) = {from_float<T>(x0), from_float<T>(x1),
                                            from_float<T>(x2), from_float<T>(x3)};
  }

  // Σ over the threads that share a token.
  MAL_DEVICE static float over_sharing(float x) {
#pragma unroll
    for (int mask = kSharing / 2; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
    return x;
  }

  // q and silu(z_g) of this thread's features, from the parts of z.
  MAL_DEVICE void load_query(float (&q)[kShare], float (&gate)[kShare], int64_t t, int head) {
    const int share = thread % kSharing;
    const bool exists = t < a.tokens;
    const float part = exists && share < splits ? a.squares[share * a.tokens + t] : 0;
#pragma unroll
    for (int i = 0; i < kShare; i += 4) {
      int feature = share_of(thread, i).column;
      Vector<float, 4> zq = {}, zg = {};
      if (exists && feature < dim) {
#pragma unroll 4
        for (int split = 0; split < splits; split++) {
          const float* z = z_of(split, t) + head * dim + feature;
          auto of_q = *reinterpret_cast<const Vector<float, 4>*>(z);
          auto of_g = *reinterpret_cast<const Vector<float, 4>*>(z + inner);
#pragma unroll
          for (int j = 0; j < 4; j++) zq.at[j] += of_q.at[j], zg.at[j] += of_g.at[j];
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) q[i + j] = zq.at[j], gate[i + j] = zg.at[j];
    }
    const float scale = rsqrtf(over_sharing(part) / a.width + kRmsNormEpsilon);  // 1 / rms
    float square = 0;
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      q[i] *= scale, gate[i] = silu(gate[i] * scale);
      square += q[i] * q[i];
    }
    const float inverse = 1 / max(sqrtf(over_sharing(square)), kSmallestLength);
#pragma unroll
    for (int i = 0; i < kShare; i++) q[i] *= inverse;
  }

  MAL_DEVICE void store_query(const float (&q)[kShare]) {
#pragma unroll
    for (int i = 0; i < kShare; i += 4) {
      Place p = share_of(thread, i);
      store_four(&s.q[p.row][p.column], q[i], q[i + 1], q[i + 2], q[i + 3]);
    }
  }

  // Whether token `i` is the first of its state.
  MAL_DEVICE bool is_first(int i) const {
    for (int before = i - 1; before >= 0; before--)
      if (s.state[before] == s.state[i]) return false;
    return s.state[i] >= 0;
  }

  // o = act(q W1) W2, or q W, of all tokens at one state.
  MAL_DEVICE void network(int64_t state, int head) {
    const int64_t at = (state * a.H + head) * dim * hidden;
    float o[kOfFeatures][4] = {};
    const bool is_deep = a.weights.first;
    for (int unit = 0; unit < hidden; unit += kUnits) {
      const int units = min(kUnits, hidden - unit);
      if (is_deep) {
        float z[kOfUnits][4] = {};
        multiply_by(z, s.q, a.weights.first + at + unit, dim, units, hidden);
        if (unit) __syncthreads();  // the last h has been read
        activate(z);
        __syncthreads();  // h
      }
      const float* last = a.weights.last + at + int64_t{unit} * dim;
      multiply_by(o, is_deep ? s.h : s.q, last, units, dim, dim);
    }
    each_number(o, [&](int token, int column, float number) { s.o[token][column] = number; });
  }

  // h = act(z), each number its thread's own.
  MAL_DEVICE void activate(const float (&z)[kOfUnits][4]) {
    each_number(z, [&](int token, int column, float number) { s.o[token][column] = number; });
#pragma unroll 1  // one copy of the code of all activations
    for (int i = 0; i < 4 * kOfUnits; i++) {
      Place p = memory::accumulator_of(lane, i % 4);
      int column = 8 * (warp + kWarps * (i / 4)) + p.column;
      float value, slope;
      memory::activate(a.activation, s.o[p.row][column], value, slope);
      s.h[p.row][column] = from_float<T>(value);
    }
  }

  // sum[16, ..] += x[16, rows] w[rows, columns], this warp's parts of 8 columns. w is float32 in
  // memory, with rows of `pitch` numbers.
  template <int kCount, int kPitch>
  MAL_DEVICE void multiply_by(float (&sum)[kCount][4], const T (*x)[kPitch], const float* w,
                              int rows, int columns, int pitch) const {
    constexpr int kSteps = 4;  // of 16 rows, all of whose numbers are on their way at once
    const Place pair = pair_of(lane);
#pragma unroll
    for (int n = 0; n < kCount; n++) {
      const int column = 8 * (warp + kWarps * n) + pair.row;
      if (column - pair.row >= columns) return;
#pragma unroll 1
      for (int first = 0; first < rows; first += 16 * kSteps) {
        float numbers[kSteps][4];
#pragma unroll
        for (int i = 0; i < 4 * kSteps; i++) {
          int row = first + i / 2 * 8 + pair.column + i % 2;
          const float* from = w + int64_t{row} * pitch + column;
          numbers[i / 4][i % 4] = row < rows && column < columns ? *from : 0;
        }
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          const float(&of)[4] = numbers[step];
          uint32_t fx[4];
          memory::load(fx, x, 0, first + 16 * step, true, false);
          mma(sum[n], fx, {packed<T>(of[0], of[1]), packed<T>(of[2], of[3])}, T());
        }
      }
    }
  }

  // Calls `each` with token, column and value of every number of multiply_by().
  template <int kCount, class Each>
  MAL_DEVICE void each_number(const float (&sum)[kCount][4], Each each) const {
#pragma unroll
    for (int n = 0; n < kCount; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        Place p = memory::accumulator_of(lane, i);
        each(p.row, 8 * (warp + kWarps * n) + p.column, sum[n][i]);
      }
  }

  // M(q) of this thread's features, from what the network gave.
  MAL_DEVICE void load_output(float (&o)[kShare], const float (&q)[kShare], int64_t state,
                              int head) const {
    float sum = 0, variance = 0;
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      Place p = share_of(thread, i);
      o[i] = s.o[p.row][p.column];
      sum += o[i];  // columns beyond D are zero
    }
    if (!a.weights.gain) return;
    const float mean = over_sharing(sum) / dim;
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      o[i] = share_of(thread, i).column < dim ? o[i] - mean : 0;
      variance += o[i] * o[i];
    }
    const float rstd = rsqrtf(over_sharing(variance) / dim + memory::kLayerNormEpsilon);
    const float* gain = a.weights.gain + (state * a.H + head) * dim;
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      int feature = share_of(thread, i).column;
      if (feature < dim) o[i] = q[i] + (1 + gain[feature]) * o[i] * rstd;
    }
  }
};

template <class T, class P>
MAL_KERNEL(kThreads, 1) aligned_residual_read(mal_aligned_residual_read_args a) {
  Read<T, P>(a).run();
}

template <class T, class P>
int start(const mal_aligned_residual_read_args& a) {
  static_assert(sizeof(Shared<T, P>) <= 99 * 1024, "more than a block may have on sm_86");
  Stages stages = stages_of(a.tokens, a.width, a.H, a.D, a.splits);
  int64_t most = max(max(stages.projections, stages.reads), stages.additions);
  if (max(most, a.tokens) > INT32_MAX) return kInvalidArgument;
  auto blocks = static_cast<unsigned>(min(most, a.blocks));
  return launch_together(aligned_residual_read<T, P>, blocks, {kThreads, 1, 1}, sizeof(Shared<T, P>),
                         a.stream, a);
}

}  // namespace
}  // namespace mal::aligned

MAL_API int mal_aligned_residual_read(const mal_aligned_residual_read_args* a) {
  using namespace mal::aligned;
  if (a->D % 8 || a->D > kFeatures || a->width % 8) return mal::kInvalidArgument;
  if (a->splits < 1 || a->splits > kSplits) return mal::kInvalidArgument;
  bool is_float32 = a->param_dtype == MAL_FLOAT32;
  if (!is_float32 && a->param_dtype != a->dtype) return mal::kInvalidArgument;
  if (a->dtype == MAL_FLOAT16)
    return is_float32 ? start<mal::fp16, float>(*a) : start<mal::fp16, mal::fp16>(*a);
  if (a->dtype == MAL_BFLOAT16)
    return is_float32 ? start<mal::bf16, float>(*a) : start<mal::bf16, mal::bf16>(*a);
  return mal::kInvalidArgument;
}
