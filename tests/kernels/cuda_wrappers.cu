// A small kernel for each wrapper of csrc/device.cuh. test_cuda_wrappers.py says what it must give,
// wherever it runs: on the host, where csrc/emu stands behind the wrappers, or on a GPU.
#include "device.cuh"
#include "swizzle.h"

namespace {

using mal::bf16;
using mal::fp16;

// from_float of `in` and to_float of `bits`, `count` numbers each
struct Convert {
  int64_t count;
  const float* in;
  void* rounded;
  const void* bits;
  float* out;
  void* stream;
};

template <class T>
MAL_KERNEL(64, 1) convert(Convert a) {
  for (int64_t i = threadIdx.x; i < a.count; i += blockDim.x) {
    static_cast<T*>(a.rounded)[i] = mal::from_float<T>(a.in[i]);
    a.out[i] = mal::to_float(static_cast<const T*>(a.bits)[i]);
  }
}

// rsqrtf, max and min of x and y
struct Maths {
  const float* x;  // [64]
  const float* y;
  float* out;  // [3, 64]
  void* stream;
};

MAL_KERNEL(64, 1) maths(Maths a) {
  int i = threadIdx.x;
  a.out[i] = rsqrtf(a.x[i]);
  a.out[64 + i] = max(a.x[i], a.y[i]);
  a.out[128 + i] = min(a.x[i], a.y[i]);
}

// two warps
struct Shuffle {
  const float* in;  // [64]
  float* out;       // [32, 64]: by mask
  float* beside;    // [64]: what the next thread of the warp wrote
  void* stream;
};

MAL_KERNEL(64, 1) shuffle(Shuffle a) {
  int thread = threadIdx.x;
  float x = a.in[thread];
  for (int mask = 0; mask < 32; mask++) a.out[64 * mask + thread] = __shfl_xor_sync(~0u, x, mask);
  float* memory = mal::shared<float>();
  memory[thread] = x;
  __syncwarp();
  mal::reread(threadIdx.x, thread);
  a.beside[thread] = memory[thread / 32 * 32 + (thread + 1) % 32];
}

// a thread's registers in order: those of a warp are the fragments of A, B and C
struct Multiply {
  const uint32_t* a;  // [64, 4]
  const uint32_t* b;  // [64, 2]
  float* c;           // [64, 4], in place
  void* stream;
};

template <class T>
MAL_KERNEL(64, 1) multiply(Multiply m) {
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; i++) a[i] = m.a[4 * threadIdx.x + i], c[i] = m.c[4 * threadIdx.x + i];
  for (int i = 0; i < 2; i++) b[i] = m.b[2 * threadIdx.x + i];
  mal::mma(c, a, b, T());
  for (int i = 0; i < 4; i++) m.c[4 * threadIdx.x + i] = c[i];
}

// two warpgroups multiply what stands in `memory`, and what their registers hold
struct Warpgroups {
  int64_t columns;            // 16, 32 or 64 of b and c
  int64_t count;              // of the numbers of memory
  const uint16_t* memory;
  const int64_t* descriptor;  // [2, 4]: a by k and by m, b by k and by n; memory begins at 0
  const uint32_t* a;          // [256, 4]
  float* c;                   // [6, 256, columns / 2]: by both a and by registers, each by both b
  void* stream;
};

template <class T, int kCount>
struct Multiplies {
  const Warpgroups& w;
  const int thread = threadIdx.x;
  const uint16_t* memory = mal::shared<uint16_t>();

  MAL_DEVICE uint64_t descriptor(int i) const {
    auto bits = static_cast<uint64_t>(w.descriptor[4 * (thread / 128) + i]);
    return bits + mal::shared_address(memory) / 16;
  }

  template <class Multiply>
  MAL_DEVICE void product(int i, Multiply multiply) const {
    float c[kCount][4];
    float* at = w.c + (i * 256 + thread) * 4 * kCount;
    for (int j = 0; j < 4 * kCount; j++) c[j / 4][j % 4] = at[j];
    mal::wgmma_fence(c);
    multiply(c);
    mal::wgmma_commit();
    mal::wgmma_wait<0>(c);
    for (int j = 0; j < 4 * kCount; j++) at[j] = c[j / 4][j % 4];
  }

  template <mal::Major kB>
  MAL_DEVICE void products() const {
    using namespace mal;
    const uint64_t b = descriptor(2 + kB);
    product(kB, [&](auto& c) { wgmma<kMajorK, kB>(c, descriptor(0), b, T()); });
    product(2 + kB, [&](auto& c) { wgmma<kMajorMN, kB>(c, descriptor(1), b, T()); });
    product(4 + kB, [&](auto& c) {
      const uint32_t* from = w.a + 4 * thread;
      wgmma<kB>(c, {from[0], from[1], from[2], from[3]}, b, T());
    });
  }
};

template <class T, int kCount>
MAL_KERNEL(256, 1) warpgroups(Warpgroups w) {
  auto* memory = mal::shared<uint16_t>();
  for (int i = threadIdx.x; i < w.count; i += 256) memory[i] = w.memory[i];
  mal::block_sync();
  if constexpr (mal::kHasWgmma) {
    Multiplies<T, kCount> all = {w};
    all.template products<mal::kMajorK>();
    all.template products<mal::kMajorMN>();
  }
}

#ifdef MAL_EMULATE  // elsewhere nothing says so
// a warpgroup that does it wrong
struct Misuse {
  int64_t how;
  float* c;  // [128, 8]
  void* stream;
};

MAL_KERNEL(128, 1) misuse(Misuse m) {
  auto* memory = mal::shared<bf16>();
  const int thread = threadIdx.x, how = static_cast<int>(m.how);
  using Tile = mal::Swizzle<64, 64>;
  for (int i = thread; i < 64 * 64; i += 128) memory[i] = mal::from_float<bf16>(0);
  if (how != 0) mal::fence_proxy_async();
  __syncthreads();
  if constexpr (mal::kHasWgmma) {
    float c[2][4] = {};
    uint32_t address = mal::shared_address(memory);
    uint64_t a = Tile::descriptor(address, how == 1 ? 1 : 0, 0);
    uint64_t b = Tile::descriptor(address, how == 2 && thread == 77 ? 16 : 0, 0);
    if (how != 3) mal::wgmma_fence(c);
    mal::wgmma<mal::kMajorK, mal::kMajorMN>(c, a, b, bf16());
    if (how != 4) mal::wgmma_commit();
    __syncthreads();
    if (how == 5) memory[thread] = mal::from_float<bf16>(1);
    if (how == 6) c[1][1] = 0;
    if (how == 7) mal::wgmma_fence(c);
    mal::wgmma_wait<0>(c);
    for (int j = 0; j < 8; j++) m.c[8 * thread + j] = c[j / 4][j % 4];
  }
}
#endif

// each lane names a row of eight numbers in shared memory
struct Matrices {
  int64_t count;          // of the tile's numbers
  const uint16_t* tile;
  const int64_t* row;     // [64]: where it begins
  uint32_t* straight;     // [64, 4]
  uint32_t* transposed;   // [64, 4]
  void* stream;
};

MAL_KERNEL(64, 1) matrices(Matrices a) {
  uint16_t* tile = mal::shared<uint16_t>();
  for (int i = threadIdx.x; i < a.count; i += 64) tile[i] = a.tile[i];
  __syncthreads();
  uint32_t straight[4], transposed[4];
  const uint16_t* row = tile + a.row[threadIdx.x];
  mal::load_matrices(straight, row);
  mal::load_matrices_transposed(transposed, row);
  for (int i = 0; i < 4; i++) {
    a.straight[4 * threadIdx.x + i] = straight[i];
    a.transposed[4 * threadIdx.x + i] = transposed[i];
  }
}

// two groups of copies; a thread reads its own of the first while the second may be under way, and
// after a barrier another thread's of the second
struct Copy {
  const uint32_t* from;   // [2, 64, 4]
  const int64_t* exists;  // [2, 64]
  uint32_t* first;        // [64, 4]
  uint32_t* second;       // [64, 4]: of thread 63 - i
  void* stream;
};

MAL_KERNEL(64, 1) copy(Copy a) {
  uint32_t* tile = mal::shared<uint32_t>();
  int thread = threadIdx.x;
  for (int i = thread; i < 2 * 64 * 4; i += 64) tile[i] = 7;  // what was there before
  __syncthreads();
  for (int at = thread; at < 2 * 64; at += 64) {
    mal::copy_async(tile + 4 * at, a.from + 4 * at, a.exists[at]);
    mal::copy_commit();
  }
  mal::copy_wait<1>();
  for (int i = 0; i < 4; i++) a.first[4 * thread + i] = tile[4 * thread + i];
  mal::copy_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; i++) a.second[4 * thread + i] = tile[4 * (64 + 63 - thread) + i];
}

// blocks of a cluster read and write each other's shared memory
struct Cluster {
  int64_t blocks, of_cluster;
  int32_t* ranks;    // [blocks]
  int32_t* read;     // [blocks, of_cluster, 32]: 100 * block + thread of every block of the cluster
  int32_t* written;  // [blocks, 32]: the same, by the block before
  void* stream;
};

MAL_KERNEL(32, 1) cluster(Cluster a) {
  int32_t* mine = mal::shared<int32_t>();
  int block = blockIdx.x, thread = threadIdx.x, rank = mal::cluster_rank();
  int blocks = static_cast<int>(a.of_cluster);
  if (thread == 0) a.ranks[block] = rank;
  mine[thread] = 100 * block + thread;
  mal::cluster_sync();
  for (int r = 0; r < blocks; r++)
    a.read[(block * blocks + r) * 32 + thread] = *mal::map_shared(mine + thread, r);
  *mal::map_shared(mine + 32 + thread, (rank + 1) % blocks) = mine[thread];
  mal::cluster_sync();  // and no block leaves while another writes to it
  a.written[block * 32 + thread] = mine[32 + thread];
}

// blocks of the whole grid read what others wrote to memory
struct Together {
  int64_t blocks;
  int32_t* between;  // [blocks]
  int32_t* read;     // [blocks, 32]: of the 32 blocks that follow
  void* stream;
};

MAL_KERNEL(32, 1) together(Together a) {
  int block = blockIdx.x, thread = threadIdx.x, blocks = static_cast<int>(a.blocks);
  if (thread == 0) a.between[block] = 100 + block;
  mal::prefetch(a.read + 32 * block);
  mal::grid_sync();
  a.read[32 * block + thread] = a.between[(block + 1 + thread) % blocks];
}

// every thread says where it is, and what it finds at the end of the block's shared memory
struct Launch {
  int64_t grid[3], block[3], bytes, of_cluster;
  int32_t* found;  // [blocks, threads, 8]
  void* stream;
};

MAL_KERNEL(1024, 1) where(Launch a) {
  auto number = [](auto at, dim3 of) {
    return static_cast<int>(at.x + of.x * (at.y + of.y * at.z));
  };
  int thread = number(threadIdx, blockDim), block = number(blockIdx, gridDim);
  int32_t* memory = mal::shared<int32_t>();
  int32_t* last = memory + a.bytes / 4 - 1;
  if (thread == 0) *last = 100 + block;
  __syncthreads();
  int at = block * static_cast<int>(blockDim.x * blockDim.y * blockDim.z) + thread;
  auto misaligned = static_cast<int>(mal::shared_address(memory) % 1024);
  mal::Vector<int32_t, 8> found = {
      {static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.y), static_cast<int>(threadIdx.z),
       static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z),
       *last, misaligned}};
  reinterpret_cast<mal::Vector<int32_t, 8>*>(a.found)[at] = found;
}

dim3 size_of(const int64_t (&d)[3]) {
  return {static_cast<unsigned>(d[0]), static_cast<unsigned>(d[1]), static_cast<unsigned>(d[2])};
}

template <class T>
int multiply_tiles(const Warpgroups* a) {
  auto kernel = a->columns == 16 ? warpgroups<T, 2> : warpgroups<T, 4>;
  if (a->columns == 64) kernel = warpgroups<T, 8>;
  return mal::launch(kernel, {1, 1, 1}, {256, 1, 1}, 2 * a->count, 1, a->stream, *a);
}

template <class Arguments>
int one_block(void (*kernel)(Arguments), const Arguments* a, size_t bytes = 0) {
  return mal::launch(kernel, {1, 1, 1}, {64, 1, 1}, bytes, 1, a->stream, *a);
}

}  // namespace

MAL_API int convert_bf16(const Convert* a) { return one_block(convert<bf16>, a); }
MAL_API int convert_fp16(const Convert* a) { return one_block(convert<fp16>, a); }
MAL_API int convert_float(const Convert* a) { return one_block(convert<float>, a); }
MAL_API int compute(const Maths* a) { return one_block(maths, a); }
MAL_API int exchange(const Shuffle* a) { return one_block(shuffle, a, 64 * 4); }
MAL_API int multiply_bf16(const Multiply* a) { return one_block(multiply<bf16>, a); }
MAL_API int multiply_fp16(const Multiply* a) { return one_block(multiply<fp16>, a); }
MAL_API int multiply_tiles_bf16(const Warpgroups* a) { return multiply_tiles<bf16>(a); }
MAL_API int multiply_tiles_fp16(const Warpgroups* a) { return multiply_tiles<fp16>(a); }
#ifdef MAL_EMULATE
MAL_API int multiply_wrongly(const Misuse* a) {
  return mal::launch(misuse, {1, 1, 1}, {128, 1, 1}, 2 * 64 * 64, 1, a->stream, *a);
}
#endif
MAL_API int load(const Matrices* a) { return one_block(matrices, a, 2 * a->count); }
MAL_API int copy_in(const Copy* a) { return one_block(copy, a, 2 * 64 * 16); }
MAL_API int meet(const Cluster* a) {
  dim3 grid = {static_cast<unsigned>(a->blocks), 1, 1};
  auto blocks = static_cast<unsigned>(a->of_cluster);
  return mal::launch(cluster, grid, {32, 1, 1}, 64 * 4, blocks, a->stream, *a);
}
MAL_API int gather(const Together* a) {
  auto blocks = static_cast<unsigned>(a->blocks);
  return mal::launch_together(together, blocks, {32, 1, 1}, 0, a->stream, *a);
}
MAL_API int start(const Launch* a) {
  auto blocks = static_cast<unsigned>(a->of_cluster);
  dim3 grid = size_of(a->grid), block = size_of(a->block);
  return mal::launch(where, grid, block, a->bytes, blocks, a->stream, *a);
}
