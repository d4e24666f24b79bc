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

struct Barrier {
  const char* name;
  unsigned expected;
  unsigned arrived = 0, round = 0;
  char order[2] = {};  // what ThreadSanitizer sees released and acquired, in turns
};

struct Warp {
  Barrier barrier;
  unsigned exchanges = 0;
  alignas(8) char slots[2][32 * 64];
};

constexpr std::align_val_t kAlignment{128};  // of shared memory, whose size is as asked for

struct Delete {
  void operator()(char* p) const { ::operator delete(p, kAlignment); }
};

struct Block {
  std::unique_ptr<char, Delete> memory;
  size_t bytes;
  Barrier barrier;
  std::deque<Warp> warps;
  unsigned rank;
};

struct Cluster;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool exists;
};

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

void wait(Barrier& barrier) {
  Fiber& fiber = *current;
  char* order = &barrier.order[barrier.round % 2];
  if (__tsan_release) __tsan_release(order);
  fiber.round = barrier.round;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    barrier.round++;
  } else {
    fiber.waits_at = &barrier;
    leave();
  }
  if (__tsan_acquire) __tsan_acquire(order);
}

bool is_ready(const Fiber& fiber) {
  return !fiber.done && (!fiber.waits_at || fiber.waits_at->round != fiber.round);
}

[[noreturn]] void fail(const std::string& what) {
  auto [thread, block, dim, _] = current->position;
  std::fprintf(stderr, "emulation: thread %u of block %u %s\n",
               thread.x + dim.x * (thread.y + dim.y * thread.z), block.x, what.c_str());
  std::abort();
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
    fail(std::string("waits at ") + fiber.waits_at->name + " that others never reach");
  }
}

}  // namespace

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
  Barrier& barrier = fiber.warp->barrier;
  fiber.round = barrier.round;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    barrier.round++;
  } else {
    fiber.waits_at = &barrier;
    leave();
  }
  return slots;
}

void multiply(float* c, const char* fragments, bool is_bf16) {
  auto element = [&](unsigned lane, unsigned index, unsigned half) {
    uint32_t pair;
    std::memcpy(&pair, fragments + 64 * lane + 4 * index, 4);
    uint16_t bits = half ? pair >> 16 : pair;
    return is_bf16 ? mal::to_float(mal::bf16{bits})
                   : static_cast<float>(std::bit_cast<_Float16>(bits));
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
      b.bytes = bytes;
      b.memory.reset(static_cast<char*>(::operator new(bytes, kAlignment)));
      std::memset(b.memory.get(), 0xFF, bytes);
      b.barrier = {"a block barrier", threads};
      b.rank = r;
      for (unsigned t = 0; t < threads; t += 32)
        b.warps.emplace_back().barrier = {"a warp barrier", std::min(32u, threads - t)};
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
