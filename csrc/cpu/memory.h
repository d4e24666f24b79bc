// What one task, a row and head, holds: the layers of its memory and scratch, and how tasks run.
#pragma once
#include <stdlib.h>

#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "../mal_kernels.h"
#include "product.h"

namespace mal {

// --- scratch ----------------------------------------------------------------------------------

// Scratch of a thread, kept between calls: the same sequence of take() finds the same memory.
class Arena {
 public:
  ~Arena() { shrink(0); }
  void begin() { next_ = 0; }
  // Lets go of what only a large call needed.
  void end() {
    size_t kept = 0, count = 0;
    while (count < owned_.size() && (kept += owned_[count].second) <= KEPT) count++;
    shrink(count);
  }
  float* take(long rows, long stride) {
    const size_t bytes = (rows * stride * 4 + 63) / 64 * 64;
    if (next_ < owned_.size() && owned_[next_].second != bytes) shrink(next_);
    if (next_ == owned_.size()) {
      owned_.reserve(next_ + 1);
      void* found = aligned_alloc(64, bytes);
      if (!found) throw std::bad_alloc();
      memset(found, 0, bytes);
      owned_.emplace_back(static_cast<float*>(found), bytes);
    }
    return owned_[next_++].first;
  }

 private:
  static constexpr size_t KEPT = 32 << 20;
  void shrink(size_t count) {
    for (size_t i = count; i < owned_.size(); i++) free(owned_[i].first);
    owned_.resize(count);
  }
  std::vector<std::pair<float*, size_t>> owned_;
  size_t next_ = 0;
};

// --- the memory's layers ----------------------------------------------------------------------

enum LayerName { FIRST, LAST, GAIN, LAYERS };

struct Layer {
  long in = 0, out = 0;         // weights [in, out] in memory [rows, stride]
  long rows = 0, stride = 0;
  long given = 0;               // stride of what it is given, [tokens, in]
  long size() const { return rows * stride; }
  bool is_unpadded() const { return rows == in && stride == out; }
};

// Depth 2: z = x FIRST, M = φ(z) LAST. Depth 1: M = x LAST. The gain γ of residual_norm is a layer
// too, which is given the number 1: M(x) = x + (1 + 1 γ) ⊙ LayerNorm(...).
struct Shape {
  long D, E;  // features; what the last layer is given, at depth 1 D too
  bool hidden, gain;
  int begin, end;  // of its layers
  Layer layer[LAYERS];

  explicit Shape(const mal_memory_call& c)
      : D(c.D), E(c.E), hidden(c.weights.first), gain(c.weights.gain), begin(hidden ? FIRST : LAST),
        end(gain ? LAYERS : GAIN) {
    if (hidden) layer[FIRST] = {D, E, padded(D), padded(E), padded(D)};
    layer[LAST] = {E, D, padded(E), padded(D), padded(E)};
    if (gain) layer[GAIN] = {1, D, 1, padded(D), VL};
  }
  long size() const {
    long total = 0;
    for (int l = begin; l < end; l++) total += layer[l].size();
    return total;
  }
};

// Weights, momentum, anchor or init of one row and head: a matrix of every layer.
struct Memory {
  float* at[LAYERS] = {};
  explicit operator bool() const { return at[LAST]; }
};

inline float* given(const mal_state& s, int l) {
  return l == FIRST ? s.first : l == LAST ? s.last : s.gain;
}

inline Memory take_memory(Arena& arena, const Shape& z) {
  Memory m;
  for (int l = z.begin; l < z.end; l++) m.at[l] = arena.take(z.layer[l].rows, z.layer[l].stride);
  return m;
}
// The caller's own memory where that needs no padding, else scratch.
inline Memory take_working(Arena& arena, const Shape& z, const mal_state& s, long g) {
  Memory m = take_memory(arena, z);
  for (int l = z.begin; l < z.end; l++)
    if (z.layer[l].is_unpadded()) m.at[l] = given(s, l) + g * z.layer[l].size();
  return m;
}
inline void load_memory(const Shape& z, const mal_state& s, long g, Memory to) {
  for (int l = z.begin; l < z.end; l++) {
    const Layer& y = z.layer[l];
    const float* from = given(s, l) + g * y.in * y.out;
    if (from == to.at[l]) continue;
    for (long i = 0; i < y.in; i++) memcpy(to.at[l] + i * y.stride, from + i * y.out, 4 * y.out);
  }
}
// What is only read: where it lies, or in scratch where it needs padding.
inline Memory load_or_point(Arena& arena, const Shape& z, const mal_state& s, long g) {
  const Memory m = take_working(arena, z, s, g);
  load_memory(z, s, g, m);
  return m;
}
inline void store_memory(const Shape& z, Memory from, const mal_state& s, long g) {
  for (int l = z.begin; l < z.end; l++) {
    const Layer& y = z.layer[l];
    float* to = given(s, l) + g * y.in * y.out;
    if (to == from.at[l]) continue;
    for (long i = 0; i < y.in; i++) memcpy(to + i * y.out, from.at[l] + i * y.stride, 4 * y.out);
  }
}
inline void copy_memory(const Shape& z, Memory from, Memory to) {
  for (int l = z.begin; l < z.end; l++) memcpy(to.at[l], from.at[l], 4 * z.layer[l].size());
}
inline void zero_memory(const Shape& z, Memory m) {
  for (int l = z.begin; l < z.end; l++) memset(m.at[l], 0, 4 * z.layer[l].size());
}

// f(layer, offset) of every vector of a memory
template <class F>
inline void each_vector(const Shape& z, F f) {
  for (int l = z.begin; l < z.end; l++)
    for (long i = 0; i < z.layer[l].size(); i += VL) f(l, i);
}
inline float dot(const Shape& z, Memory a, Memory b) {
  float total = 0;
  for (int l = z.begin; l < z.end; l++) {
    const Layer& y = z.layer[l];
    for (long i = 0; i < y.in; i++)
      total += row_dot(a.at[l] + i * y.stride, b.at[l] + i * y.stride, y.out);
  }
  return total;
}

// --- tasks ------------------------------------------------------------------------------------

// Products of many momenta fall below 1e-38, where arithmetic is a hundred times slower: as zero.
class FlushDenormals {
#if defined(__SSE__)
  unsigned before_ = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  uint64_t before_;

 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | 1u << 24));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }
#else
 public:
  FlushDenormals() {}
#endif
};

// Runs f(task, arena) of every row and head, on up to `threads` threads; tasks share no sum, so the
// result does not depend on them. Returns 0, or 1 where memory ran out.
template <class F>
int each_task(const mal_memory_call& c, int64_t threads, F f) {
  const long tasks = c.rows * c.H;
  const int used = int(std::max<int64_t>(1, std::min<int64_t>(tasks, threads)));
  int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(used) if (used > 1) reduction(| : failed)
  for (long g = 0; g < tasks; g++) {
    thread_local Arena arena;
    const FlushDenormals flush;
    try {
      arena.begin();
      f(g, arena);
      arena.end();
    } catch (const std::bad_alloc&) {
      failed = 1;
    }
  }
  return failed;
}

}  // namespace mal
