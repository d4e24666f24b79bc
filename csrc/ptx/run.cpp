// Blocks, warps and whose turn it is; the C interface.
#include <algorithm>

#include "numbers.h"

namespace ptx {

constexpr u32 kLongestTurn = 400;  // instructions, before another warp may come
constexpr u64 kMostSteps = 4'000'000'000;

Machine::Machine(Launch given) : launch(std::move(given)), random(static_cast<u32>(launch.seed)) {
  u64 threads = launch.block[0] * launch.block[1] * launch.block[2];
  warps_of_block = (threads + kLanes - 1) / kLanes;
  warps_of_grid = warps_of_block * launch.grid[0] * launch.grid[1] * launch.grid[2];
  if (launch.is_cooperative) {
    workspace.resize(64);
    launch.spans.push_back({reinterpret_cast<u64>(workspace.data()), workspace.size()});
  }
  for (const Span& s : launch.spans)
    memories.push_back({s.base, s.size, std::vector<Cell>(launch.is_checked ? s.size / 2 + 1 : 0)});
}

void Machine::run() {
  u64 blocks = u64{launch.grid[0]} * launch.grid[1] * launch.grid[2];
  u64 at_once = launch.is_cooperative ? blocks : launch.cluster;
  for (u64 first = 0; first < blocks; first += at_once) run_together(first, at_once);
}

std::unique_ptr<Block> Machine::new_block(u64 index, Cluster* cluster, u32 rank) {
  const auto& grid = launch.grid;
  auto made = std::make_unique<Block>();
  made->id = {static_cast<u32>(index % grid[0]), static_cast<u32>(index / grid[0] % grid[1]),
              static_cast<u32>(index / grid[0] / grid[1])};
  made->rank = rank;
  made->cluster = cluster;
  made->bytes.assign(launch.shared + 16, 0xff);
  if (launch.is_checked) made->cells.resize(launch.shared / 2 + 8);
  made->warps.resize(warps_of_block);
  u64 threads = launch.block[0] * launch.block[1] * launch.block[2];
  Lanes garbage;
  garbage.fill(kGarbage);
  for (u64 w = 0; w < warps_of_block; w++) {
    Warp& x = made->warps[w];
    x.id = static_cast<int>(w), x.in_grid = static_cast<int>(index * warps_of_block + w);
    x.block = made.get();
    x.registers.assign(launch.registers, garbage);
    for (auto* counts : {&x.accumulates, &x.feeds}) counts->resize(launch.registers);
    x.changed.resize(launch.registers);
    for (Clock* c : {&x.seen, &x.fenced, &x.released, &x.acquired}) c->resize(warps_of_grid);
    u64 lanes = std::min<u64>(threads - w * kLanes, kLanes);
    x.live = static_cast<u32>(low_bits(static_cast<int>(lanes)));
    x.frames.push_back({0, -1, x.live});
  }
  return made;
}

// Blocks `first` on: a cluster, or the whole of a cooperative grid.
void Machine::run_together(u64 first, u64 count) {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Warp*> warps, ready;
  for (u64 b = 0; b < count; b++) {
    u32 rank = static_cast<u32>(b % launch.cluster);
    if (!rank) {
      clusters.push_back(std::make_unique<Cluster>());
      Cluster& c = *clusters.back();
      for (Clock* k : {&c.arriving, &c.done, &c.arriving_fenced, &c.done_fenced})
        k->resize(warps_of_grid);
    }
    blocks.push_back(new_block(first + b, clusters.back().get(), rank));
    clusters.back()->blocks.push_back(blocks.back().get());
    for (Warp& w : blocks.back()->warps) warps.push_back(&w);
  }
  for (;;) {
    ready.clear();
    for (Warp* w : warps)
      if (!w->is_done && w->waits == kReady) ready.push_back(w);
    if (!ready.empty()) {
      warp = ready[random() % ready.size()], block = warp->block;
      turn();
      continue;
    }
    bool is_over = true, moved = false;
    for (Warp* w : warps) is_over &= w->is_done;
    if (is_over) return;
    for (auto& b : blocks) moved |= open_barriers(*b);
    for (auto& c : clusters) moved |= open_cluster(*c);
    if (!moved) stuck(warps);
  }
}

void Machine::turn() {
  u32 steps = 1 + random() % kLongestTurn;
  while (steps-- && !warp->is_done && warp->waits == kReady) step();
  if (warp->is_done || warp->waits != kReady) open_barriers(*block), open_cluster(*block->cluster);
  if (tally.steps > kMostSteps) stop("does not end");
}

void Machine::stuck(const std::vector<Warp*>& warps) {
  for (Warp* w : warps)
    if (!w->is_done) {
      warp = w, block = w->block, current = w->stopped_at;
      found("a warp waits for ever at a barrier");
    }
  stop("deadlock at a barrier");
}

void Machine::step() {
  auto& frames = warp->frames;
  while (frames.size() > 1 &&
         (frames.back().pc == frames.back().meets || !(frames.back().lanes & warp->live)))
    frames.pop_back();
  Frame& frame = frames.back();
  current = static_cast<int>(frame.pc++);
  const Instruction& i = launch.code[current];
  const u32 all = frame.lanes & warp->live;
  active = all;
  tally.steps++, tally.executed[i.op]++;
  if (i.predicate >= 0) {
    const Lanes& p = warp->registers[i.predicate];
    active = 0;
    for (int l = 0; l < kLanes; l++)
      active |= static_cast<u32>((p[l] & 1) != static_cast<u64>(i.is_negated)) << l;
    active &= all;
    if (!active) return;
  }
  if (i.op == OP_BRA)
    branch(i, frame, all);
  else
    execute(i);
}

void Machine::execute(const Instruction& i) {
  try {
    switch (i.op) {
      case OP_NOP: break;
      case OP_MOV_PACK: case OP_MOV_UNPACK: pack(i); break;
      case OP_SETP: set_predicate(i); break;
      case OP_BFE: case OP_BFI: case OP_PRMT: case OP_SHF: case OP_LOP3: case OP_POPC: case OP_CLZ:
      case OP_BREV: bits(i); break;
      case OP_LD_PARAM: load_parameter(i); break;
      case OP_LD: load(i); break;
      case OP_ST: store(i); break;
      case OP_ATOM: atomic(i); break;
      case OP_SHFL: shuffle(i); break;
      case OP_VOTE: vote(i); break;
      case OP_ACTIVEMASK: {
        Lanes& to = out(0);
        each([&](int l) { to[l] = active; });
        break;
      }
      case OP_ELECT: {
        Lanes &to = out(0), &is_it = out(1);
        const int first = static_cast<int>(first_active());
        each([&](int l) { to[l] = first, is_it[l] = l == first; });
        break;
      }
      case OP_EXIT: leave(); break;
      case OP_TRAP: stop("trap");
      case OP_BAR: barrier(i); break;
      case OP_BAR_WARP:
        if (active != warp->live) found("bar.warp.sync under divergence");
        break;
      case OP_CLUSTER_ARRIVE: arrive_at_cluster(); break;
      case OP_CLUSTER_WAIT: warp->waits = kAtCluster; break;
      case OP_FENCE: fence(); break;
      case OP_FENCE_ASYNC: fence_async(); break;
      case OP_CP_ASYNC: start_copy(i); break;
      case OP_CP_COMMIT: commit_copies(); break;
      case OP_CP_WAIT: wait_for_copies(i); break;
      case OP_LDMATRIX: load_matrices(i); break;
      case OP_STMATRIX: store_matrices(i); break;
      case OP_MMA: warp_product(i); break;
      case OP_WGMMA: start_product(i); break;
      case OP_WGMMA_FENCE: warp->product_fence = tally.steps; break;
      case OP_WGMMA_COMMIT: commit_products(); break;
      case OP_WGMMA_WAIT: wait_for_products(in(0)[0]); break;
      default: scalar(i);
    }
  } catch (const Stopped& error) {
    if (std::string(error.what()).rfind("line ", 0) == 0) throw;
    stop(error.what());
  }
  if (warp->waits != kReady) warp->stopped_at = current;
}

// Lanes that part meet at flag[0].
void Machine::branch(const Instruction& i, Frame& frame, u32 all) {
  if (active == all) {
    frame.pc = i.target;
    return;
  }
  i64 behind = frame.pc, meets = i.flag[0];
  frame.pc = meets;
  warp->frames.push_back({behind, meets, all & ~active});
  warp->frames.push_back({i.target, meets, active});
}

void Machine::leave() {
  warp->live &= ~active;
  if (warp->live) return;
  warp->is_done = true;
  bool is_copying = !warp->copies.empty();
  for (auto& group : warp->copy_groups) is_copying |= !group.empty();
  if (is_copying) found("exits with a cp.async under way");
  if (warp->under_way) found("exits with a wgmma under way");
  for (Warp& w : block->warps)
    if (!w.is_done) return;
  block->has_left = true;
  check_readers_of(*block);
}

// The block has left: had all others that touched its shared memory been waited for?
void Machine::check_readers_of(Block& of_block) {
  if (!launch.is_checked || launch.cluster == 1) return;
  Clock known(warps_of_grid);
  for (Warp& w : of_block.warps) {
    join(known, w.seen);
    known[w.in_grid] = kAll;
  }
  for (const Cell& cell : of_block.cells)
    for (const Access& a : {cell.read, cell.write})
      if (a.warp >= 0 && a.clock > known[a.warp])
        found("leaves while its shared memory may still be in use" + of(a));
}

}  // namespace ptx

// Runs a launch of decoded PTX. Findings go to `text`, one a line; what was executed to `counts`:
// by operation, then steps, shared loads, shared stores, unfenced copies, FLOPs. Returns 1 if it had to
// stop.
extern "C" int ptx_run(const ptx::Instruction* code, int64_t instructions,
                       const ptx::Operand* operands, int64_t operand_count, int64_t registers,
                       const uint32_t* grid, const uint32_t* block, const uint8_t* parameters,
                       int64_t parameter_bytes, const int64_t* options, const ptx::Span* spans,
                       int64_t span_count, uint64_t* counts, char* text, int64_t text_bytes) {
  using namespace ptx;
  Launch launch{{code, code + instructions},
                {operands, operands + operand_count},
                registers,
                {grid[0], grid[1], grid[2]},
                {block[0], block[1], block[2]},
                {parameters, parameters + parameter_bytes},
                static_cast<u64>(options[0]),
                static_cast<u64>(options[1]),
                static_cast<u32>(options[2]),
                options[3] != 0,
                options[4] != 0,
                options[5],
                static_cast<u64>(options[6]),
                {spans, spans + span_count}};
  Machine machine(std::move(launch));
  int stopped = 0;
  try {
    machine.run();
  } catch (const Stopped&) {
    stopped = 1;
  }
  std::string all;
  for (const std::string& line : machine.findings) all += line + "\n";
  std::strncpy(text, all.c_str(), text_bytes - 1);
  const Tally& t = machine.tally;
  std::copy(t.executed.begin(), t.executed.end(), counts);
  const u64 totals[] = {t.steps, t.shared_loads, t.shared_stores, t.unfenced_copies,
                        t.tensor_flops};
  std::copy(totals, totals + 5, counts + kOps);
  return stopped;
}
