// The scheduler behind emulation.h. Compile it without sanitizers: it must not be watched.
#include "emulation.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

// There under ThreadSanitizer and AddressSanitizer, null otherwise.
extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}

namespace emu {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kNoOrder = 1;  // a switch of fibers orders nothing by itself

struct Block;
struct Fiber;

struct Barrier {
  const char* name;
  unsigned expected;
  std::vector<Block*> blocks = {};  // all of whose threads meet here
  unsigned arrived = 0, round = 0;
  char order[2] = {};  // what ThreadSanitizer sees released and acquired, in turns
};

struct Warp {
  Barrier barrier;
  unsigned exchanges = 0;
  alignas(8) char slots[2][32 * 64];
};

// Four warps that multiply together. Nothing but their numbers passes at the barrier.
struct Warpgroup {
  Barrier barrier;
  std::vector<Fiber*> fibers;
};

constexpr std::align_val_t kAlignment{1024};  // of shared memory, whose size is as asked for

struct Delete {
  void operator()(char* p) const { ::operator delete(p, kAlignment); }
};

struct Block {
  std::unique_ptr<char, Delete> memory;
  size_t bytes, threads;
  Barrier barrier;
  std::deque<Warp> warps;
  std::deque<Warpgroup> warpgroups;
  unsigned rank;
  std::unique_ptr<char[]> fenced;  // the memory when all threads had last passed fences and met
  size_t fences = 0;               // threads that have passed one since they met
};

struct Cluster;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool exists;
};

// What a thread's accumulators will be; they are NaN while products are under way.
struct Accumulators {
  float* c;
  std::vector<float> values;
  unsigned under_way = 0;
};

constexpr unsigned kUnderWay = 0xFFFFFFFF;  // NaN

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* watched = nullptr;  // ThreadSanitizer's name of this fiber
  void* fake_stack = nullptr;
  Position position;
  Cluster* cluster;
  Block* block;
  Warp* warp;
  Barrier* waits_at = nullptr;
  unsigned round;
  unsigned exchanges = 0;
  bool done = false;
  std::vector<Copy> started;  // since the last commit
  std::deque<std::vector<Copy>> copies;
  Warpgroup* warpgroup;
  std::vector<Product> products;  // likewise
  std::deque<std::vector<Product>> groups;
  std::deque<Accumulators> accumulators;
  bool fenced_products = false, fenced_proxy = false;
};

struct Cluster {
  Barrier barrier;
  std::deque<Block> blocks;
  std::deque<Fiber> fibers;
};

Fiber* current = nullptr;
ucontext_t scheduler;
void* scheduler_watched = nullptr;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
const std::function<void()>* kernel = nullptr;
// blocks start after what the host did and end before it goes on; nothing orders one with another
char launch_begin, launch_end;

void enter(Fiber& fiber) {
  current = &fiber;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.watched, kNoOrder);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void leave() {
  Fiber& fiber = *current;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(scheduler_watched, kNoOrder);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, scheduler_stack,
                                   scheduler_stack_size);
  swapcontext(&fiber.context, &scheduler);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_size);
}

void start() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  if (__tsan_acquire) __tsan_acquire(&launch_begin);
  (*kernel)();
  if (!current->accumulators.empty()) fail("ends with products that it has not waited for");
  if (__tsan_release) __tsan_release(&launch_end);
  current->done = true;
  leave();
}

void prepare(ucontext_t& context, void* stack) {
  getcontext(&context);
  context.uc_stack = {stack, 0, kStack};
  context.uc_link = nullptr;
  makecontext(&context, start, 0);
}

// The last thread to come goes on at once, calls `last` and does not leave before.
template <class Last>
void meet(Barrier& barrier, Last last) {
  Fiber& fiber = *current;
  fiber.round = barrier.round;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    barrier.round++;
    last();
  } else {
    fiber.waits_at = &barrier;
    leave();
  }
}

// What all threads of a block have written becomes visible to the asynchronous proxy, if all have
// passed a fence.
void show(Block& block) {
  if (std::exchange(block.fences, 0) < block.threads) return;
  for (size_t i = 0; i < block.bytes; i++) block.fenced[i] = block.memory.get()[i];
}

void wait(Barrier& barrier) {
  char* order = &barrier.order[barrier.round % 2];
  if (__tsan_release) __tsan_release(order);
  if (!barrier.blocks.empty())
    current->block->fences += std::exchange(current->fenced_proxy, false);
  meet(barrier, [&] {
    for (Block* block : barrier.blocks) show(*block);
  });
  if (__tsan_acquire) __tsan_acquire(order);
}

bool is_ready(const Fiber& fiber) {
  return !fiber.done && (!fiber.waits_at || fiber.waits_at->round != fiber.round);
}

// Every second pass runs the threads in the opposite order.
void run_all(std::deque<Fiber>& fibers) {
  for (bool forward = true, progress = true; progress; forward = !forward) {
    progress = false;
    for (size_t i = 0; i < fibers.size(); i++) {
      Fiber& fiber = fibers[forward ? i : fibers.size() - 1 - i];
      if (!is_ready(fiber)) continue;
      fiber.waits_at = nullptr;
      progress = true;
      enter(fiber);
    }
  }
  for (Fiber& fiber : fibers) {
    if (fiber.done) continue;
    current = &fiber;
    fail((std::string("waits at ") + fiber.waits_at->name + " that others never reach").c_str());
  }
}

// --- products of a warpgroup -------------------------------------------------------------------

// The fields of a matrix descriptor of sm_90.
struct Descriptor {
  unsigned start, leading, stride, base, mode;
  explicit Descriptor(uint64_t bits)
      : start(16 * (bits & 0x3FFF)),
        leading(16 * (bits >> 16 & 0x3FFF)),
        stride(16 * (bits >> 32 & 0x3FFF)),
        base(bits >> 49 & 7),
        mode(bits >> 62) {
    if (bits & 0x3FF1'C000'C000'C000) fail("sets reserved bits of a descriptor");
  }
};

float number(uint16_t bits, bool is_bf16) {
  return is_bf16 ? mal::to_float(mal::bf16{bits})
                 : static_cast<float>(std::bit_cast<_Float16>(bits));
}

// Calls `each` with the row (of b: the column), k and value of the eight numbers of an operand that
// thread `index` of the warpgroup has read, or has in registers.
template <class Each>
void each_number(const Operand& operand, unsigned index, bool is_bf16, Each each) {
  for (unsigned i = 0; i < 8; i++) {
    unsigned row = index / 2, k = index % 2 * 8 + i;
    if (operand.in_registers) {  // PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"
      row = index / 32 * 16 + index % 32 / 4 + i / 2 % 2 * 8;
      k = i / 4 * 8 + index % 4 * 2 + i % 2;
    } else if (operand.is_major_mn) {
      row = index / 16 * 8 + i, k = index % 16;
    }
    each(row, k, number(operand.four[i / 2] >> 16 * (i % 2), is_bf16));
  }
}

Accumulators* accumulators_at(Fiber& fiber, const float* c) {
  for (Accumulators& x : fiber.accumulators)
    if (x.c == c) return &x;
  return nullptr;
}

// c[64, n] += a b, of what the threads hold as their products `of`.
void multiply(const std::vector<Fiber*>& fibers, const std::vector<const Product*>& of) {
  const Product& first = *of[0];
  unsigned columns = first.columns;
  std::vector<float> a(64 * 16), b(16 * columns), c(64 * columns);
  for (unsigned t = 0; t < 128; t++) {
    const Product& mine = *of[t];
    if (mine.a.descriptor != first.a.descriptor || mine.b.descriptor != first.b.descriptor)
      fail("multiplies what other threads of its warpgroup do not");
    each_number(mine.a, t, mine.is_bf16, [&](int row, int k, float x) { a[16 * row + k] = x; });
    if (mine.b.is_mine)
      each_number(mine.b, t, mine.is_bf16, [&](int n, int k, float x) { b[columns * k + n] = x; });
  }
  // PTX ISA, "Accumulator D": number i of thread t
  auto place = [&](unsigned t, unsigned i) -> float& {
    unsigned row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
    return c[row * columns + i / 4 * 8 + t % 4 * 2 + i % 2];
  };
  auto values = [&](unsigned t) { return accumulators_at(*fibers[t], of[t]->c)->values.data(); };
  for (unsigned t = 0; t < 128; t++)
    for (unsigned i = 0; i < columns / 2; i++) place(t, i) = values(t)[i];
  for (unsigned row = 0; row < 64; row++)
    for (unsigned k = 0; k < 16; k++)
      for (unsigned n = 0; n < columns; n++)
        c[row * columns + n] += a[16 * row + k] * b[k * columns + n];
  for (unsigned t = 0; t < 128; t++)
    for (unsigned i = 0; i < columns / 2; i++) values(t)[i] = place(t, i);
}

// One product less is under way. A thread frees itself what it has allocated: ThreadSanitizer would
// report anything else.
void complete(Fiber& fiber, const float* c) {
  Accumulators& done = *accumulators_at(fiber, c);
  if (--done.under_way) return;
  for (size_t i = 0; i < done.values.size(); i++) {
    if (std::bit_cast<unsigned>(done.c[i]) != kUnderWay) fail("writes accumulators of wgmma");
    done.c[i] = done.values[i];
  }
  std::erase_if(fiber.accumulators, [](const Accumulators& x) { return !x.under_way; });
}

void multiply_groups(const std::vector<Fiber*>& fibers, size_t count) {
  if (fibers.size() != 128) fail("is of no whole warpgroup");
  for (size_t g = 0; g < count; g++)
    for (size_t i = 0; i < fibers[0]->groups[g].size(); i++) {
      std::vector<const Product*> products;
      for (Fiber* fiber : fibers) {
        if (fiber->groups.size() <= g || fiber->groups[g].size() <= i)
          fail("multiplies more often than other threads of its warpgroup");
        products.push_back(&fiber->groups[g][i]);
      }
      multiply(fibers, products);
    }
}

}  // namespace

void fail(const char* what) {
  auto [thread, block, dim, _] = current->position;
  std::fprintf(stderr, "emulation: thread %u of block %u %s\n",
               thread.x + dim.x * (thread.y + dim.y * thread.z), block.x, what);
  std::abort();
}

const Position& here() { return current->position; }
char* shared_memory(unsigned rank) { return current->cluster->blocks[rank].memory.get(); }
unsigned rank() { return current->block->rank; }
void block_barrier() { wait(current->block->barrier); }
void warp_barrier() { wait(current->warp->barrier); }
void cluster_barrier() { wait(current->cluster->barrier); }

void must_be_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("takes 16 bytes at no multiple of 16");
}

void must_be_shared(const void* p) {
  must_be_aligned(p);
  const Block& block = *current->block;
  auto at = static_cast<const char*>(p) - block.memory.get();
  if (at < 0 || at + 16 > static_cast<ptrdiff_t>(block.bytes))
    fail("takes 16 bytes outside its shared memory");
}

const char* exchange(const void* mine, size_t bytes) {
  Fiber& fiber = *current;
  char* slots = fiber.warp->slots[fiber.exchanges++ % 2];
  unsigned lane = fiber.position.thread.x % 32;
  for (size_t i = 0; i < bytes; i++) slots[64 * lane + i] = static_cast<const char*>(mine)[i];
  // nothing but the values passes: unlike a barrier it orders no memory access
  meet(fiber.warp->barrier, [] {});
  return slots;
}

void multiply(float* c, const char* fragments, bool is_bf16) {
  auto element = [&](unsigned lane, unsigned index, unsigned half) {
    uint32_t pair;
    std::memcpy(&pair, fragments + 64 * lane + 4 * index, 4);
    return number(half ? pair >> 16 : pair, is_bf16);
  };
  unsigned lane = current->position.thread.x % 32;
  for (unsigned i = 0; i < 4; i++) {
    unsigned row = lane / 4, upper = i / 2, column = 2 * (lane % 4) + i % 2;
    for (unsigned k = 0; k < 16; k++) {
      float a = element(4 * row + k % 8 / 2, upper + 2 * (k / 8), k % 2);
      float b = element(4 * column + k % 8 / 2, 4 + k / 8, k % 2);
      c[i] += a * b;
    }
  }
}

// PTX ISA, "Shared Memory Matrix Layout" and "Strides": the operand is made of patterns of eight
// rows, as wide as the swizzling mode, with `row` and `chunk` before chunks change places.
const char* place_of(const Operand& operand, unsigned index) {
  Descriptor d(operand.descriptor);
  const unsigned width[] = {0, 8, 4, 2};  // chunks of 16 bytes
  const unsigned chunks = width[d.mode];
  if (!chunks) fail("multiplies without a swizzling mode, which is not emulated");
  if (d.base || d.start / 128 % chunks) fail("begins an operand inside a swizzling pattern");
  unsigned row = index / 2, chunk = index % 2, apart = row / 8 * d.stride;
  if (operand.is_major_mn) {
    row = index % 16, chunk = index / 16 % chunks;
    apart = row / 8 * d.stride + index / 16 / chunks * d.leading;
  }
  unsigned address = d.start + apart + row % 8 * 16 * chunks + 16 * chunk;
  return current->block->memory.get() + (address ^ address / 128 % chunks * 16);
}

void fence_products() { current->fenced_products = true; }

void start_product(const Product& product) {
  Fiber& fiber = *current;
  if (!fiber.fenced_products) fail("multiplies without wgmma_fence");
  Accumulators* c = accumulators_at(fiber, product.c);
  if (!c) {
    float* end = product.c + product.columns / 2;
    c = &fiber.accumulators.emplace_back(Accumulators{product.c, {product.c, end}});
    std::fill(product.c, end, std::bit_cast<float>(kUnderWay));
  }
  c->under_way++;
  fiber.products.push_back(product);
}

void commit_products() {
  current->groups.push_back(std::exchange(current->products, {}));
  current->fenced_products = false;
}

void wait_for_products(size_t groups, const std::function<void(const Operand&)>& read_again) {
  Fiber& fiber = *current;
  size_t due = fiber.groups.size() > groups ? fiber.groups.size() - groups : 0;
  if (!due) return;
  for (size_t g = 0; g < due; g++)
    for (const Product& product : fiber.groups[g])
      for (Operand operand : {product.a, product.b}) read_again(operand);  // of its own stack
  Warpgroup& warpgroup = *fiber.warpgroup;
  meet(warpgroup.barrier, [&] { multiply_groups(warpgroup.fibers, due); });
  for (; due; due--, fiber.groups.pop_front())
    for (const Product& product : fiber.groups.front()) complete(fiber, product.c);
}

void must_be_complete(const float* c) {
  if (accumulators_at(*current, c)) fail("takes accumulators that wgmma still writes");
}

void fence_proxy_async() { current->fenced_proxy = true; }

void must_be_fenced(const char* p) {
  const Block& block = *current->block;
  for (auto at = p - block.memory.get(), end = at + 16; at < end; at++)
    if (block.memory.get()[at] != block.fenced[at])
      fail("gives wgmma what has not passed fence_proxy_async and a barrier");
}

void copy_later(void* to, const void* from, size_t bytes, bool exists) {
  current->started.push_back({to, from, bytes, exists});
}

void commit_copies() { current->copies.push_back(std::exchange(current->started, {})); }

void wait_for_copies(size_t groups) {
  auto& copies = current->copies;
  for (; copies.size() > groups; copies.pop_front()) {
    for (const Copy& copy : copies.front()) {
      if (copy.exists)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
    }
  }
}

void run(dim3 grid, dim3 block, size_t bytes, unsigned cluster, const std::function<void()>& body) {
  unsigned threads = block.x * block.y * block.z;
  size_t blocks = size_t{grid.x} * grid.y * grid.z;
  kernel = &body;
  if (__tsan_get_current_fiber) scheduler_watched = __tsan_get_current_fiber();
  std::deque<Cluster> clusters;  // all kept: a block has no order with those that ran before it
  for (size_t first = 0; first < blocks; first += cluster) {
    Cluster& c = clusters.emplace_back();
    c.barrier = {"a cluster barrier", threads * cluster};
    for (unsigned r = 0; r < cluster; r++) {
      Block& b = c.blocks.emplace_back();
      b.bytes = bytes, b.threads = threads;
      b.memory.reset(static_cast<char*>(::operator new(bytes, kAlignment)));
      std::memset(b.memory.get(), 0xFF, bytes);
      b.fenced = std::make_unique_for_overwrite<char[]>(bytes);
      std::memset(b.fenced.get(), 0xFF, bytes);
      b.barrier = {"a block barrier", threads, {&b}};
      c.barrier.blocks.push_back(&b);
      b.rank = r;
      for (unsigned t = 0; t < threads; t += 32)
        b.warps.emplace_back().barrier = {"a warp barrier", std::min(32u, threads - t)};
      for (unsigned t = 0; t < threads; t += 128)
        b.warpgroups.emplace_back().barrier = {"a warpgroup's products",
                                               std::min(128u, threads - t)};
    }
    if (__tsan_release) __tsan_release(&launch_begin);
    for (unsigned i = 0; i < threads * cluster; i++) {
      Fiber& fiber = c.fibers.emplace_back();
      auto t = i % threads;
      auto b = static_cast<unsigned>(first) + i / threads;
      fiber.position = {{t % block.x, t / block.x % block.y, t / (block.x * block.y)},
                        {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)},
                        block,
                        grid};
      fiber.cluster = &c;
      fiber.block = &c.blocks[i / threads];
      fiber.warp = &fiber.block->warps[t / 32];
      fiber.warpgroup = &fiber.block->warpgroups[t / 128];
      fiber.warpgroup->fibers.push_back(&fiber);
      fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
      if (__tsan_create_fiber) fiber.watched = __tsan_create_fiber(0);
      prepare(fiber.context, fiber.stack.get());
    }
    run_all(c.fibers);
    // used again, a stack would look to ThreadSanitizer like memory that two blocks share
    if (!__tsan_create_fiber)
      for (Fiber& fiber : c.fibers) fiber.stack.reset();
  }
  if (__tsan_acquire) __tsan_acquire(&launch_end);
  for (Cluster& c : clusters)
    for (Fiber& fiber : c.fibers)
      if (__tsan_destroy_fiber) __tsan_destroy_fiber(fiber.watched);
  kernel = nullptr;
}

}  // namespace emu
