// Where warps wait for each other, and what they then know.
#include <algorithm>

#include "machine.h"

namespace ptx {

// Threads at most at once; a warp that has left is not waited for.
void Machine::barrier(const Instruction& i) {
  if (active != warp->live) found("bar.sync under divergence");
  u64 id = in(0)[first_active()];
  warp->waits = kAtBarrier;
  warp->waits_for = i.count > 1 ? static_cast<int>(in(1)[first_active()]) : 0;
  block->barriers[id].push_back(warp);
}

void Machine::meet(std::vector<Warp*>& warps) {
  Clock seen(warps_of_grid), fenced(warps_of_grid);
  for (Warp* w : warps) {
    join(seen, w->seen), join(fenced, w->fenced);
    seen[w->in_grid] = w->now, fenced[w->in_grid] = w->fenced_at;
  }
  for (Warp* w : warps) {
    w->seen = seen, w->fenced = fenced;
    w->now++, w->waits = kReady;
  }
  warps.clear();
}

// Whether a warp of the block may go on.
bool Machine::open_barriers(Block& block) {
  bool moved = false;
  size_t alive = 0;
  for (Warp& w : block.warps) alive += !w.is_done;
  for (auto& [id, warps] : block.barriers) {
    if (warps.empty()) continue;
    size_t needed = warps[0]->waits_for ? warps[0]->waits_for / kLanes : alive;
    if (warps.size() >= needed) meet(warps), moved = true;
  }
  return moved;
}

void Machine::arrive_at_cluster() {
  if (active != warp->live) found("barrier.cluster under divergence");
  Cluster& cluster = *block->cluster;
  if (warp->phase != cluster.phase) stop("arrives at the cluster's barrier twice");
  warp->phase++, cluster.arrived++;
  join(cluster.arriving, warp->seen), join(cluster.arriving_fenced, warp->fenced);
  cluster.arriving[warp->in_grid] = warp->now++;
  cluster.arriving_fenced[warp->in_grid] = warp->fenced_at;
}

// Whether all have arrived, or one that waits for that may go on.
bool Machine::open_cluster(Cluster& cluster) {
  bool moved = false;
  size_t alive = 0;
  for (Block* b : cluster.blocks)
    for (Warp& w : b->warps) alive += !w.is_done || w.phase > cluster.phase;
  if (cluster.arrived && cluster.arrived >= alive) {
    cluster.phase++, cluster.arrived = 0;
    cluster.done = cluster.arriving, cluster.done_fenced = cluster.arriving_fenced;
    moved = true;
  }
  for (Block* b : cluster.blocks)
    for (Warp& w : b->warps)
      if (w.waits == kAtCluster && w.phase <= cluster.phase) {
        join(w.seen, cluster.done), join(w.fenced, cluster.done_fenced);
        w.waits = kReady, moved = true;
      }
  return moved;
}

// Of memory: what was done before is what an atomic publishes from here on, and what loads have
// seen published is known.
void Machine::fence() {
  join(warp->seen, warp->acquired);
  warp->released = warp->seen;
  warp->released[warp->in_grid] = warp->now++;
}

// What this warp knows of is there for the async proxy.
void Machine::fence_async() {
  join(warp->fenced, warp->seen);
  warp->fenced_at = warp->now++;
}

}  // namespace ptx
