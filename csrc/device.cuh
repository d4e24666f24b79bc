// All that a kernel may use: CUDA's own names (threadIdx, __syncthreads, __shfl_xor_sync, ...), and
// wrappers around what is not C++: launches, dynamic shared memory, clusters, tensor cores,
// asynchronous copies. With -DMAL_EMULATE the same names come from emu/emulation.h and run on the
// host; each wrapper stands there a second time, as the PTX manual describes it.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "mal_kernels.h"

#ifdef MAL_EMULATE
#include "emu/emulation.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// a block of `threads`, with registers left for `blocks` of them on an SM
#define MAL_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MAL_DEVICE __device__ __forceinline__
#define MAL_HOST_DEVICE __host__ __device__ __forceinline__

namespace mal {

using bf16 = __nv_bfloat16;
using fp16 = __half;

MAL_DEVICE float to_float(float x) { return x; }
MAL_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
MAL_DEVICE float to_float(fp16 x) { return __half2float(x); }
template <class T>
MAL_DEVICE T from_float(float x);
template <>
MAL_DEVICE float from_float<float>(float x) { return x; }
template <>
MAL_DEVICE bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
MAL_DEVICE fp16 from_float<fp16>(float x) { return __float2half_rn(x); }

// The block's dynamic shared memory.
template <class T>
MAL_DEVICE T* shared() {
  extern __shared__ __align__(1024) unsigned char mal_shared_memory[];
  return reinterpret_cast<T*>(mal_shared_memory);
}

// Launches with one attribute, or with none if that is null.
template <class Arguments>
int launch_with(cudaLaunchAttribute* attribute, void (*kernel)(Arguments), dim3 grid, dim3 block,
                size_t bytes, void* stream, Arguments arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (bytes > 48 * 1024) {
    auto largest = cudaFuncAttributeMaxDynamicSharedMemorySize;
    cudaError_t error = cudaFuncSetAttribute(kernel, largest, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  bool clusters = attribute && attribute->id == cudaLaunchAttributeClusterDimension;
  if (clusters && attribute->val.clusterDim.x > 8) {  // not every GPU with clusters has room for it
    int at_once = 0;
    auto large = cudaFuncAttributeNonPortableClusterSizeAllowed;
    cudaError_t error = cudaFuncSetAttribute(kernel, large, 1);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&at_once, kernel, &config);
    if (error == cudaSuccess && at_once == 0) error = cudaErrorInvalidClusterSize;
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

// Launches `grid` blocks, `cluster` of them in a cluster, with `bytes` of dynamic shared memory.
template <class Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, dim3 block, size_t bytes, unsigned cluster,
           void* stream, Arguments arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return launch_with(cluster > 1 ? &attribute : nullptr, kernel, grid, block, bytes, stream,
                     arguments);
}

// Launches `blocks` that all run at once and may wait for each other; refused where they are more
// than the GPU holds.
template <class Arguments>
int launch_together(void (*kernel)(Arguments), unsigned blocks, dim3 block, size_t bytes,
                    void* stream, Arguments arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return launch_with(&attribute, kernel, {blocks, 1, 1}, block, bytes, stream, arguments);
}

// Waits for all threads of launch_together(); what they wrote to memory is then seen by all.
MAL_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

// x = index, of which the compiler then sees no more than that it is not negative.
MAL_DEVICE void reread(unsigned index, int& x) {
  asm volatile("mov.u32 %0, %1;" : "=r"(x) : "r"(index));
  __builtin_assume(x >= 0);
}

// A cluster of one block needs no hardware for clusters; compiled for sm_80 there is no other.
MAL_DEVICE unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}

// Whether there is wgmma: on Hopper alone. -DMAL_MMA_SYNC leaves it out there too.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(MAL_MMA_SYNC)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// What this thread has written to shared memory is then seen by wgmma, which reads it past the
// caches of other instructions (PTX: the async proxy).
MAL_DEVICE void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Waits for all threads of the block; what they wrote to shared memory is then seen by all, and by
// wgmma.
MAL_DEVICE void block_sync() {
  if (kHasWgmma) fence_proxy_async();
  __syncthreads();
}

// Likewise of the cluster.
MAL_DEVICE void cluster_sync() {
  if (kHasWgmma) fence_proxy_async();
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// Where `p`, in this block's shared memory, stands in that of block `rank` of the cluster.
template <class T>
MAL_DEVICE T* map_shared(T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
  return p;
#endif
}

// Where `p` stands in the block's shared memory.
MAL_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Starts bringing the line of 128 bytes with `p` to L2.
MAL_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// c[16, 8] += a[16, 16] b[16, 8], in the fragments of PTX's mma.m16n8k16.
MAL_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
MAL_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], fp16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- products of a warpgroup -------------------------------------------------------------------

// No register of an accumulator is moved across.
template <int kCount>
MAL_DEVICE void hold(float (&c)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(c[n][i])::"memory");
}

// Before products whose accumulators, or whose a in registers, other instructions have written.
template <int... kCounts>
MAL_DEVICE void wgmma_fence(float (&... c)[kCounts][4]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  (hold(c), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
MAL_DEVICE void wgmma_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most kGroups groups of products are under way; those that write to `c` are not.
template <int kGroups, int... kCounts>
MAL_DEVICE void wgmma_wait(float (&... c)[kCounts][4]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  (hold(c), ...);
#endif
}

// Of an operand in shared memory: its k are numbers of a row, or rows.
enum Major { kMajorK, kMajorMN };

// as operands of asm: c[count][4], and their names
#define MAL_FOUR(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define MAL_C2 MAL_FOUR(0), MAL_FOUR(1)
#define MAL_C4 MAL_C2, MAL_FOUR(2), MAL_FOUR(3)
#define MAL_C8 MAL_C4, MAL_FOUR(4), MAL_FOUR(5), MAL_FOUR(6), MAL_FOUR(7)
#define MAL_NAMES2 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MAL_NAMES4 MAL_NAMES2 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MAL_NAMES8 \
  MAL_NAMES4 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
// p is true: what c was is added; 1, 1: the signs of a and b
#define MAL_WGMMA(names, shape, type, operands)                          \
  "{.reg .pred p; setp.eq.u32 p, 0, 0;\n"                                \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names \
  "}, " operands ";}"
// Both overloads for one N = 8 count: `shared` and `registers` name the operands behind c.
#define MAL_WGMMAS(count, shape, shared, registers, T, type)                                      \
  template <Major kA, Major kB>                                                                   \
  MAL_DEVICE void wgmma(float (&c)[count][4], uint64_t a, uint64_t b, T) {                        \
    asm volatile(MAL_WGMMA(MAL_NAMES##count, shape, type, shared)                                 \
                 : MAL_C##count                                                                   \
                 : "l"(a), "l"(b), "n"(int{kA}), "n"(int{kB}));                                   \
  }                                                                                               \
  template <Major kB>                                                                             \
  MAL_DEVICE void wgmma(float (&c)[count][4], const uint32_t (&a)[4], uint64_t b, T) {            \
    asm volatile(MAL_WGMMA(MAL_NAMES##count, shape, type, registers)                              \
                 : MAL_C##count                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int{kB}));             \
  }
#define MAL_WGMMAS_OF(T, type)                                                                    \
  MAL_WGMMAS(2, "m64n16k16", "%8,%9,p,1,1,%10,%11", "{%8,%9,%10,%11},%12,p,1,1,%13", T, type)     \
  MAL_WGMMAS(4, "m64n32k16", "%16,%17,p,1,1,%18,%19", "{%16,%17,%18,%19},%20,p,1,1,%21", T, type) \
  MAL_WGMMAS(8, "m64n64k16", "%32,%33,p,1,1,%34,%35", "{%32,%33,%34,%35},%36,p,1,1,%37", T, type)

// Starts c[64, 8 kCount] += a[64, 16] b[16, 8 kCount], by four warps, of operands that Swizzle's
// descriptors tell of. A warp has 16 rows of c: the fragments of kCount products of m16n8k16 next
// to each other. Or of a in registers, the fragment of m16n8k16.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
MAL_WGMMAS_OF(bf16, "bf16")
MAL_WGMMAS_OF(fp16, "f16")
#else  // never called
template <Major kA, Major kB, int kCount, class T>
MAL_DEVICE void wgmma(float (&)[kCount][4], uint64_t, uint64_t, T) {}
template <Major kB, int kCount, class T>
MAL_DEVICE void wgmma(float (&)[kCount][4], const uint32_t (&)[4], uint64_t, T) {}
#endif
#undef MAL_FOUR
#undef MAL_C2
#undef MAL_C4
#undef MAL_C8
#undef MAL_NAMES2
#undef MAL_NAMES4
#undef MAL_NAMES8
#undef MAL_WGMMA
#undef MAL_WGMMAS
#undef MAL_WGMMAS_OF

// --- a warp's matrices -------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
MAL_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
MAL_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts copying 16 bytes from global to shared memory; zeros if not `exists` (`from` must still be
// a valid address). Done after copy_wait<n>() with at most n groups of copies started later.
MAL_DEVICE void copy_async(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}
MAL_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
MAL_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace mal
#endif

namespace mal {

constexpr int kInvalidArgument = 1;  // cudaErrorInvalidValue

// kCount numbers that are loaded and stored at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

// Four numbers from the first of them on.
template <class T>
MAL_DEVICE Vector<T, 4>& four_at(T& first) {
  return reinterpret_cast<Vector<T, 4>&>(first);
}
template <class T>
MAL_DEVICE const Vector<T, 4>& four_at(const T& first) {
  return reinterpret_cast<const Vector<T, 4>&>(first);
}

}  // namespace mal
