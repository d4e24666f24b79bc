// A machine that runs the decoded PTX of one launch on the host, and reports what a GPU would
// punish or, worse, would not. Written from the PTX ISA manual; it shares nothing with emu/.
//
// A warp is 32 lanes in lockstep; where they part they meet again at the branch's immediate
// post-dominator. Warps take turns in a seeded random order. Copies (cp.async) and products (wgmma)
// are done when they start, or as late as they may be: when they are waited for.
//
// Every two bytes of memory know who touched them last. A warp knows of the others what it has
// learnt at barriers (a vector clock), so that two accesses without a barrier between them are a
// race whichever came first. What it does not know: weak memory order below barriers and fences,
// arrival of a copy in parts, bank conflicts, time, and what ptxas makes of all this.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using i32 = int32_t;
using u64 = uint64_t;
using i64 = int64_t;

#define OP(name) OP_##name,
#define TYPE(name, bytes)
#define COMPARISON(name)
#define SPECIAL(name)
enum Op {
#include "codes.inc"
  kOps
};
#undef OP
#undef TYPE
#define OP(name)
#define TYPE(name, bytes) T_##name,
enum Type {
#include "codes.inc"
};
#undef TYPE
#define TYPE(name, bytes) bytes,
constexpr int kBytes[] = {
#include "codes.inc"
};
#undef TYPE
#undef COMPARISON
#define TYPE(name, bytes)
#define COMPARISON(name) IS_##name,
enum Comparison {
#include "codes.inc"
};
#undef COMPARISON
#undef SPECIAL
#define COMPARISON(name)
#define SPECIAL(name) SR_##name,
enum Special {
#include "codes.inc"
};
#undef OP
#undef TYPE
#undef COMPARISON
#undef SPECIAL

enum Space { kGeneric, kShared, kGlobal };
enum Kind { kRegister, kConstant, kSpecial, kSymbol };  // of an operand
enum When { kEarly, kLate, kMixed };                    // copies and products are done

// As decode.py writes them.
struct Instruction {
  i32 op, type, from;  // from: what cvt converts
  i32 flag[3];         // their meaning stands where they are used
  i32 predicate, is_negated;
  i32 count, first;  // operands
  i32 target, line;
};
struct Operand {
  i64 kind, value;
};
struct Span {
  u64 base, size;
};

struct Stopped : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kLanes = 32;
constexpr u32 kAll = ~0u;
constexpr u64 kSharedWindow = 0x7e0000000000ull;  // generic addresses of shared memory
constexpr int kRankShift = 24;  // of a shared address: above stands the block's rank + 1
constexpr u64 kOffsetMask = (1ull << kRankShift) - 1;
constexpr u64 kGarbage = 0x7ff7bad17fc0bad1ull;  // in a register before its first write: NaNs

using Lanes = std::array<u64, kLanes>;
using Clock = std::vector<u32>;  // by warp of the grid

// Keeps in `to` the later of both.
inline void join(Clock& to, const Clock& from) {
  for (size_t i = 0; i < to.size(); i++) to[i] = std::max(to[i], from[i]);
}

struct Access {
  i32 warp = -1;  // of the grid; -1: none
  u32 clock = 0;
  i32 instruction = 0;
  bool is_copy = false, is_atomic = false;
};

// Two bytes of memory.
struct Cell {
  Access write, read;
  bool is_written = false, is_awaited = false;  // awaited: a cp.async to it is under way
  u16 products = 0;                             // that are under way and read it
};

struct Memory {
  u64 base, size;
  std::vector<Cell> cells;
};

struct Copy {
  u64 to, from;
  u32 size, from_size;  // zeros behind from_size
  bool is_done;
};

struct Product {
  int instruction;
  u64 a, b;  // descriptors
  bool adds, is_done;
  std::array<Lanes, 4> fragment;  // a in registers
  std::vector<u32> cells;         // that it reads
};

struct Frame {  // of lanes that go together
  i64 pc, meets;
  u32 lanes;
};

enum Waiting { kReady, kAtBarrier, kAtCluster };

struct Block;
struct Warp {
  int id, in_grid;
  Block* block;
  std::vector<Lanes> registers;
  std::vector<Frame> frames;
  u32 live = 0;
  bool is_done = false;
  Waiting waits = kReady;
  int waits_for = 0;  // threads at the barrier; 0: all
  u32 phase = 0;      // of the cluster's barrier, that it has arrived at
  int stopped_at = 0;

  u32 now = 1, fenced_at = 0;
  Clock seen, fenced;        // what of others it knows of, and what is there for the async proxy
  Clock released, acquired;  // before its last fence, and by loads since

  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<Product> products;
  std::deque<std::vector<Product>> product_groups;
  std::vector<u8> accumulates, feeds;  // products under way that write a register, that read it
  int under_way = 0;                   // sum of both
  std::vector<u64> changed;            // the step of a register's last write
  u64 product_fence = 0;               // the step of the last wgmma.fence
};

struct Cluster {
  std::vector<Block*> blocks;
  u32 phase = 0, arrived = 0;
  Clock arriving, done, arriving_fenced, done_fenced;
};

struct Block {
  std::array<u32, 3> id;
  u32 rank;
  bool has_left = false;
  std::vector<u8> bytes;
  std::vector<Cell> cells;
  std::vector<Warp> warps;
  Cluster* cluster;
  std::map<u64, std::vector<Warp*>> barriers;
};

struct Launch {
  std::vector<Instruction> code;
  std::vector<Operand> operands;
  i64 registers;
  std::array<u32, 3> grid, block;
  std::vector<u8> parameters;
  u64 shared, dynamic;  // bytes of a block, and of them the dynamic ones
  u32 cluster;
  bool is_cooperative, is_checked;
  i64 when;
  u64 seed;
  std::vector<Span> spans;
};

struct Tally {
  std::array<u64, kOps> executed{};
  u64 steps = 0, shared_loads = 0, shared_stores = 0, unfenced_copies = 0, tensor_flops = 0;
};

class Machine {
 public:
  explicit Machine(Launch launch);
  void run();
  Tally tally;
  std::set<std::string> findings;

 private:
  // --- run.cpp: blocks, warps and whose turn it is
  void run_together(u64 first, u64 count);
  std::unique_ptr<Block> new_block(u64 index, Cluster* cluster, u32 rank);
  void turn();
  void step();
  void execute(const Instruction& i);
  void branch(const Instruction& i, Frame& frame, u32 all);
  void leave();
  void check_readers_of(Block& block);
  [[noreturn]] void stuck(const std::vector<Warp*>& warps);

  // --- barriers.cpp
  void barrier(const Instruction& i);
  void meet(std::vector<Warp*>& warps);
  bool open_barriers(Block& block);
  void arrive_at_cluster();
  bool open_cluster(Cluster& cluster);
  void fence();
  void fence_async();

  // --- memory.cpp
  bool knows(const Access& access) const;
  std::string of(const Access& access) const;
  void touch(Cell& cell, bool writes, const char* where, bool is_same = false,
             bool is_atomic = false);
  Block* owner(u64 address);
  u8* shared_at(u64 address, u32 bytes, bool writes, const u8* value = nullptr);
  bool is_shared(int space, u64 address) const;
  Memory* memory_of(u64 address, u32 bytes);
  u8* global_at(u64 address, u32 bytes, bool writes, const u8* value = nullptr,
                bool is_atomic = false);
  u8* at(int space, u64 address, u32 bytes, bool writes, const u8* value = nullptr,
         bool is_atomic = false);
  void load(const Instruction& i);
  void load_parameter(const Instruction& i);
  void store(const Instruction& i);
  void atomic(const Instruction& i);
  void start_copy(const Instruction& i);
  void arrive(Copy& copy);
  void commit_copies();
  void wait_for_copies(const Instruction& i);

  // --- matrices.cpp
  void load_matrices(const Instruction& i);
  void store_matrices(const Instruction& i);
  void warp_product(const Instruction& i);
  void start_product(const Instruction& i);
  u32 element_at(u64 descriptor, bool is_transposed, int major, int k) const;
  float operand_of(u32 offset, bool is_bf16);
  void list_cells(Product& product);
  void compute(Product& product);
  void commit_products();
  void wait_for_products(size_t keep);
  void check_registers(const Instruction& i, int inputs);
  bool is_late() { return launch.when == kLate || (launch.when == kMixed && random() % 2); }

  // --- scalar.cpp: what touches registers alone
  void scalar(const Instruction& i);
  void pack(const Instruction& i);
  void bits(const Instruction& i);
  void set_predicate(const Instruction& i);
  void shuffle(const Instruction& i);
  void vote(const Instruction& i);
  u64 special(int name, int lane) const;

  const Operand& operand(int index) const {
    return launch.operands[launch.code[current].first + index];
  }
  // The operand's values by lane; a constant or the like is put into `place`.
  const Lanes& in(int index) {
    const Operand& o = operand(index);
    if (o.kind == kRegister) {
      if (warp->under_way && warp->accumulates[o.value])
        found("a register that wgmma writes is read before it is waited for");
      return warp->registers[o.value];
    }
    return other_than_register(o, index);
  }
  const Lanes& other_than_register(const Operand& o, int index);
  Lanes& out(int index) {
    const Operand& o = operand(index);
    if (o.kind != kRegister) return sink;
    if (warp->under_way && (warp->accumulates[o.value] || warp->feeds[o.value]))
      found("a register of a wgmma is written before it is waited for");
    warp->changed[o.value] = tally.steps;
    return warp->registers[o.value];
  }
  u32 first_active() const { return __builtin_ctz(active); }

  template <class F>
  void each(F f) const {
    if (active == kAll)
      for (int lane = 0; lane < kLanes; lane++) f(lane);
    else
      for (int lane = 0; lane < kLanes; lane++)
        if (active >> lane & 1) f(lane);
  }

  void found(const std::string& what);
  [[noreturn]] void stop(const std::string& what) {
    found(what);
    throw Stopped("line " + std::to_string(launch.code[current].line) + ": " + what);
  }

  Launch launch;
  std::vector<Memory> memories;
  std::map<u64, Clock> published;  // by address: what a release has made known there
  std::mt19937 random;
  u64 warps_of_block, warps_of_grid;
  std::array<Lanes, 72> places;  // of operands that are no registers
  Lanes sink;
  Warp* warp = nullptr;
  Block* block = nullptr;
  u32 active = 0;   // lanes
  int current = 0;  // instruction
  std::vector<u8> workspace;  // of a cooperative launch, whose address stands in envreg
};

}  // namespace ptx
