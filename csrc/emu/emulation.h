// CUDA on the host, for the sources of this folder's parent: g++ -std=c++20 -DMAL_EMULATE -x c++.
//
// Every CUDA thread is a fiber; a barrier, a shuffle or a tensor-core instruction hands over to the
// next. Shared memory starts as NaN. ThreadSanitizer is told of the fibers and of every barrier, so
// it reports two threads that touch the same memory without one between them, whichever ran first;
// AddressSanitizer sees every access out of bounds. A barrier that some thread never reaches ends
// the program with its name.
//
// A product of a warpgroup reads shared memory by its descriptors' fields, not by any tile's type.
// Its accumulators are NaN until it is waited for. What it reads must not change until then, and
// must have been there at a barrier to which all threads came through a fence of the async proxy.
//
// What this cannot show, and only a GPU can:
//  * whether ../device.cuh calls the hardware's instructions rightly. Each wrapper is written here
//    anew; tests/kernels/cuda_wrappers.cu holds both to one definition, but a GPU must run the other half.
//  * memory order weaker than that of a barrier. Of the async proxy it knows only that a
//    fence of every thread stands before a barrier.
//  * whether wgmma takes a descriptor as the manual is understood here: above all one that starts
//    inside a row of a swizzled tile, which the manual does not speak of, though others do it. Nor
//    whether registers with a change while wgmma reads them: they are read at once here.
//  * threads that really run at once: fibers take turns, and only at barriers. A loop that waits
//    for another thread's write never ends; the mask of a shuffle is not looked at. A copy arrives
//    whole, when it is waited for: not early, not in parts, not out of order.
//  * the last bits: tensor cores sum in another order, expf, erff and tanhf are the host's, and
//    nvcc contracts a * b + c.
//  * what fits: registers, spills, blocks and clusters at once on the GPU; a vector load that is
//    misaligned (copies and matrices are checked).
//  * speed: bank conflicts, coalescing, occupancy, latency.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define MAL_KERNEL(threads, blocks) static void
#define MAL_DEVICE inline
#define MAL_HOST_DEVICE inline
#define __device__
#define __host__
#define __restrict__ __restrict

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emu {

// --- implemented in emulation.cpp, which is compiled without sanitizers -------------------------

struct Position {
  dim3 thread, block, block_dim, grid_dim;
};
const Position& here();
char* shared_memory(unsigned rank);  // of block `rank` of the cluster
unsigned rank();
void block_barrier();
void warp_barrier();
void cluster_barrier();
// End the program where the hardware would fault: `p` is not a multiple of 16 bytes; or moreover
// not in this block's shared memory.
void must_be_aligned(const void* p);
void must_be_shared(const void* p);
// Hands `bytes` (at most 64) of every thread of the warp to all of them: 32 slots of 64 bytes,
// valid until the warp's next exchange.
const char* exchange(const void* mine, size_t bytes);
void multiply(float* c, const char* fragments, bool is_bf16);  // fragments: of exchange, a then b
// An operand of wgmma: this thread's registers, or what a descriptor tells of shared memory, of
// which a thread of the warpgroup reads 16 bytes.
struct Operand {
  uint64_t descriptor;
  bool in_registers, is_major_mn, is_mine;  // is_mine: there are 16 bytes for this thread
  uint32_t four[4];
};
struct Product {
  float* c;          // this thread's accumulators
  unsigned columns;  // n; each thread has n / 2
  Operand a, b;
  bool is_bf16;
};
// Where the 16 bytes stand that thread `index` of the warpgroup reads.
const char* place_of(const Operand& operand, unsigned index);
void start_product(const Product& product);
void fence_products();
void commit_products();
// Calls `read_again` with the operands of all but the newest `groups` groups, and completes them;
// then the accumulators `c` must not be under way any more.
void wait_for_products(size_t groups, const std::function<void(const Operand&)>& read_again);
void must_be_complete(const float* c);
void fence_proxy_async();
void must_be_fenced(const char* p);  // 16 bytes of shared memory
[[noreturn]] void fail(const char* what);

void copy_later(void* to, const void* from, size_t bytes, bool exists);
void commit_copies();
void wait_for_copies(size_t groups);
void run(dim3 grid, dim3 block, size_t bytes, unsigned cluster, const std::function<void()>& body);

}  // namespace emu

#define threadIdx (emu::here().thread)
#define blockIdx (emu::here().block)
#define blockDim (emu::here().block_dim)
#define gridDim (emu::here().grid_dim)

inline void __syncthreads() { emu::block_barrier(); }
inline void __syncwarp() { emu::warp_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const char* all = emu::exchange(&value, sizeof value);
  std::memcpy(&value, all + 64 * ((threadIdx.x % 32) ^ mask), sizeof value);
  return value;
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
using std::max;
using std::min;
inline float max(float x, float y) { return std::fmax(x, y); }  // of a number and NaN the number
inline float min(float x, float y) { return std::fmin(x, y); }

namespace mal {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  _Float16 value;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(fp16 x) { return x.value; }
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};  // to nearest even
}
template <>
inline fp16 from_float<fp16>(float x) {
  if (x != x) return {std::bit_cast<_Float16>(uint16_t{0x7FFF})};
  return {static_cast<_Float16>(x)};
}

template <class T>
T* shared() { return reinterpret_cast<T*>(emu::shared_memory(emu::rank())); }

// How many such blocks Hopper's 132 multiprocessors hold at once, but for their registers.
inline unsigned blocks_at_once(dim3 block, size_t bytes) {
  unsigned threads = block.x * block.y * block.z;
  if (bytes > 227 * 1024 || threads > 1024) return 0;
  return 132 * min(2048 / threads, static_cast<unsigned>(228 * 1024 / (bytes + 1024)));
}

template <class Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, dim3 block, size_t bytes, unsigned cluster, void*,
           Arguments arguments) {
  bool refused = !blocks_at_once(block, bytes) || cluster > 16 || grid.x % cluster;
  if (refused) return 1;  // cudaErrorInvalidValue
  emu::run(grid, block, bytes, cluster, [&] { kernel(arguments); });
  return 0;
}

// the grid is one cluster
template <class Arguments>
int launch_together(void (*kernel)(Arguments), unsigned blocks, dim3 block, size_t bytes, void*,
                    Arguments arguments) {
  if (blocks > blocks_at_once(block, bytes)) return 1;
  if (blocks) emu::run({blocks, 1, 1}, block, bytes, blocks, [&] { kernel(arguments); });
  return 0;
}
inline void grid_sync() { emu::cluster_barrier(); }
inline void prefetch(const void* p) { *static_cast<const volatile char*>(p); }  // it must exist

#ifdef MAL_MMA_SYNC
constexpr bool kHasWgmma = false;
#else
constexpr bool kHasWgmma = true;
#endif

inline void reread(unsigned index, int& x) { x = index; }
inline unsigned cluster_rank() { return emu::rank(); }
inline void fence_proxy_async() { emu::fence_proxy_async(); }
inline void block_sync() {
  if (kHasWgmma) fence_proxy_async();
  __syncthreads();
}
inline void cluster_sync() {
  if (kHasWgmma) fence_proxy_async();
  emu::cluster_barrier();
}
template <class T>
T* map_shared(T* p, unsigned rank) {
  auto offset = reinterpret_cast<char*>(p) - emu::shared_memory(emu::rank());
  return reinterpret_cast<T*>(emu::shared_memory(rank) + offset);
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16": lane l holds rows l / 4 and l / 4 + 8.
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  emu::multiply(c, emu::exchange(mine, sizeof mine), true);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], fp16) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  emu::multiply(c, emu::exchange(mine, sizeof mine), false);
}

// Lane l receives elements 2 (l % 4) and the next of row l / 4 of each matrix; transposed, of
// column l / 4.
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emu::must_be_shared(row);
  const char* all = emu::exchange(&row, sizeof row);
  unsigned lane = threadIdx.x % 32;
  for (unsigned matrix = 0; matrix < 4; matrix++) {
    const uint16_t* from;
    std::memcpy(&from, all + 64 * (8 * matrix + lane / 4), sizeof from);
    r[matrix] = from[2 * (lane % 4)] | uint32_t{from[2 * (lane % 4) + 1]} << 16;
  }
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emu::must_be_shared(row);
  const char* all = emu::exchange(&row, sizeof row);
  unsigned lane = threadIdx.x % 32;
  for (unsigned matrix = 0; matrix < 4; matrix++) {
    r[matrix] = 0;
    for (unsigned i = 0; i < 2; i++) {
      const uint16_t* from;
      std::memcpy(&from, all + 64 * (8 * matrix + 2 * (lane % 4) + i), sizeof from);
      r[matrix] |= uint32_t{from[lane / 4]} << 16 * i;
    }
  }
}

// --- products of a warpgroup: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" --------

enum Major { kMajorK, kMajorMN };

inline uint32_t shared_address(const void* p) {
  return static_cast<const char*>(p) - emu::shared_memory(emu::rank());
}

// What wgmma reads must have passed a fence, and may not change until it is waited for.
inline emu::Operand operand(uint64_t descriptor, Major major, unsigned threads) {
  emu::Operand x = {descriptor, false, major == kMajorMN, threadIdx.x % 128 < threads, {}};
  if (!x.is_mine) return x;
  const char* from = emu::place_of(x, threadIdx.x % 128);
  emu::must_be_shared(from);
  emu::must_be_fenced(from);
  std::memcpy(x.four, from, sizeof x.four);
  return x;
}
inline void must_be_the_same(const emu::Operand& x) {
  if (x.in_registers || !x.is_mine) return;
  if (std::memcmp(x.four, emu::place_of(x, threadIdx.x % 128), sizeof x.four))
    emu::fail("changes what wgmma still reads");
}

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

template <Major kA, Major kB, int kCount, class T>
void wgmma(float (&c)[kCount][4], uint64_t a, uint64_t b, T) {
  static_assert(kCount <= 8, "a thread would have to read more than 16 bytes of b");
  emu::Operand of_a = operand(a, kA, 128), of_b = operand(b, kB, 16 * kCount);
  emu::start_product({c[0], 8 * kCount, of_a, of_b, kIsBf16<T>});
}
template <Major kB, int kCount, class T>
void wgmma(float (&c)[kCount][4], const uint32_t (&a)[4], uint64_t b, T) {
  emu::Operand registers = {0, true, false, true, {a[0], a[1], a[2], a[3]}};
  emu::start_product({c[0], 8 * kCount, registers, operand(b, kB, 16 * kCount), kIsBf16<T>});
}
template <int... kCounts>
void wgmma_fence(float (&... c)[kCounts][4]) {
  (emu::must_be_complete(c[0]), ...);
  emu::fence_products();
}
inline void wgmma_commit() { emu::commit_products(); }
template <int kGroups, int... kCounts>
void wgmma_wait(float (&... c)[kCounts][4]) {
  emu::wait_for_products(kGroups, must_be_the_same);
  (emu::must_be_complete(c[0]), ...);
}

// --- copies --------------------------------------------------------------------------------------

// The destination is NaN until the copy is waited for.
inline void copy_async(void* to, const void* from, bool exists) {
  emu::must_be_shared(to);
  emu::must_be_aligned(from);
  std::memset(to, 0xFF, 16);
  emu::copy_later(to, from, 16, exists);
}
inline void copy_commit() { emu::commit_copies(); }
template <int kGroups>
void copy_wait() { emu::wait_for_copies(kGroups); }

}  // namespace mal
