// Loads, stores, asynchronous copies, and who touched what.
#include "numbers.h"

namespace ptx {

void Machine::found(const std::string& what) {
  constexpr size_t kMost = 40;
  if (findings.size() < kMost)
    findings.insert("line " + std::to_string(launch.code[current].line) + ": " + what);
}

// Whether this warp comes after the access.
bool Machine::knows(const Access& access) const {
  return access.warp < 0 || access.warp == warp->in_grid || access.clock <= warp->seen[access.warp];
}

std::string Machine::of(const Access& access) const {
  u64 size = warps_of_block * launch.cluster;
  bool is_near = access.warp / size == warp->in_grid / size;
  return std::string(is_near ? " of its block or cluster" : " of another block") + ", at line " +
         std::to_string(launch.code[access.instruction].line);
}

// `is_same`: a write of what stands there already, which is no race.
void Machine::touch(Cell& cell, bool writes, const char* where, bool is_same, bool is_atomic) {
  auto report = [&](const std::string& what) { found(std::string(where) + ": " + what); };
  if (cell.is_awaited) report("touched while a cp.async to it is under way");
  if (writes && cell.products) report("written while wgmma reads it");
  if (!knows(cell.write) && !is_same && !(is_atomic && cell.write.is_atomic))
    report((writes ? "two writes race, with one" : "a read races with a write") + of(cell.write));
  Access access{warp->in_grid, warp->now, current, false, is_atomic};
  if (writes) {
    if (!knows(cell.read) && !is_same && !(is_atomic && cell.read.is_atomic))
      report("a write races with an earlier read" + of(cell.read));
    cell.write = access, cell.is_written = true, cell.read.warp = -1;
  } else if (knows(cell.read)) {
    cell.read = access;
  }
}

Block* Machine::owner(u64 address) {
  u64 rank = address >> kRankShift & 0xff;
  const auto& blocks = block->cluster->blocks;
  if (rank == 0 || rank > blocks.size()) return nullptr;
  return blocks[rank - 1];
}

u8* Machine::shared_at(u64 address, u32 bytes, bool writes, const u8* value) {
  Block* of_block = owner(address);
  u64 offset = address & kOffsetMask;
  if (!of_block || offset + bytes > launch.shared)
    stop("shared access out of bounds at " + std::to_string(offset) + " of " +
         std::to_string(launch.shared));
  if (offset % bytes) stop("misaligned shared access");
  if (of_block->has_left) found("shared memory of a block that has left");
  u8* place = &of_block->bytes[offset];
  if (launch.is_checked) {
    bool is_same = value && !std::memcmp(place, value, bytes);
    for (u64 c = offset / 2; c <= (offset + bytes - 1) / 2; c++) {
      Cell& cell = of_block->cells[c];
      if (!writes && !cell.is_written) found("shared memory is read before it is written");
      touch(cell, writes, "shared", is_same);
    }
  }
  return place;
}

Memory* Machine::memory_of(u64 address, u32 bytes) {
  for (Memory& memory : memories)
    if (address >= memory.base && address + bytes <= memory.base + memory.size) return &memory;
  return nullptr;
}

u8* Machine::global_at(u64 address, u32 bytes, bool writes, const u8* value, bool is_atomic) {
  Memory* memory = memory_of(address, bytes);
  if (!memory) stop(std::string("global ") + (writes ? "write" : "read") + " out of bounds");
  if (address % bytes) stop("misaligned global access");
  u8* place = reinterpret_cast<u8*>(address);
  if (launch.is_checked) {
    bool is_same = value && !std::memcmp(place, value, bytes);
    u64 offset = address - memory->base;
    for (u64 c = offset / 2; c <= (offset + bytes - 1) / 2; c++)
      touch(memory->cells[c], writes, "global", is_same, is_atomic);
  }
  return place;
}

bool Machine::is_shared(int space, u64 address) const {
  return space == kShared || (space == kGeneric && address >= kSharedWindow &&
                              address < kSharedWindow + (1ull << 32));
}

u8* Machine::at(int space, u64 address, u32 bytes, bool writes, const u8* value, bool is_atomic) {
  if (is_shared(space, address))
    return shared_at(static_cast<u32>(address - (space == kShared ? 0 : kSharedWindow)), bytes,
                     writes, value);
  return global_at(address, bytes, writes, value, is_atomic);
}

void Machine::load_parameter(const Instruction& i) {
  int results = i.count - 2, bytes = kBytes[i.type];
  Lanes from = in(results);
  const Lanes& offset = in(results + 1);
  each([&](int l) { from[l] += offset[l]; });
  for (int r = 0; r < results; r++) {
    Lanes& to = out(r);
    each([&](int l) {
      u64 at = from[l] + r * bytes, x = 0;
      if (at + bytes > launch.parameters.size()) stop("parameter out of bounds");
      std::memcpy(&x, &launch.parameters[at], bytes);
      to[l] = widened(i.type, x);
    });
  }
}

// Order that a load or an atomic makes: what is released at an address is known to who acquires.
enum Order { kWeak, kRelaxed, kAcquire, kRelease, kBoth };

// flag: space; bytes of a register; order
void Machine::load(const Instruction& i) {
  int results = i.count - 2, bytes = kBytes[i.type];
  Lanes from = in(results);
  const Lanes& offset = in(results + 1);
  std::array<const u8*, kLanes> places;
  each([&](int l) {
    from[l] += offset[l];
    places[l] = at(i.flag[0], from[l], results * bytes, false, nullptr, i.flag[2] != kWeak);
    if (auto known = published.find(from[l]); i.flag[2] && known != published.end())
      join(i.flag[2] == kAcquire ? warp->seen : warp->acquired, known->second);
  });
  tally.shared_loads += is_shared(i.flag[0], from[first_active()]);
  for (int r = 0; r < results; r++) {
    Lanes& to = out(r);
    each([&](int l) {
      u64 x = 0;
      std::memcpy(&x, places[l] + r * bytes, bytes);
      to[l] = is_signed(i.type) ? widened(i.type, x) & low_bits(8 * i.flag[1]) : x;
    });
  }
}

// flag: space
void Machine::store(const Instruction& i) {
  int values = i.count - 2, bytes = kBytes[i.type];
  Lanes to = in(0);
  const Lanes& offset = in(1);
  std::array<const Lanes*, 8> from;
  for (int v = 0; v < values; v++) from[v] = &in(2 + v);
  tally.shared_stores += is_shared(i.flag[0], to[first_active()]);
  each([&](int l) {
    u8 value[32];
    for (int v = 0; v < values; v++) std::memcpy(value + v * bytes, &(*from[v])[l], bytes);
    std::memcpy(at(i.flag[0], to[l] + offset[l], values * bytes, true, value), value,
                values * bytes);
  });
}

// flag: space; add, exch, max, cas, or; order
void Machine::atomic(const Instruction& i) {
  Lanes at_ = in(1);
  const Lanes &offset = in(2), &by = in(3);
  const Lanes& other = i.count > 4 ? in(4) : by;
  Lanes& to = out(0);
  int bytes = kBytes[i.type], order = i.flag[2];
  each([&](int l) {
    u64 address = at_[l] + offset[l], old = 0, made;
    u8* place = at(i.flag[0], address, bytes, true, nullptr, true);
    std::memcpy(&old, place, bytes);
    switch (i.flag[1]) {
      case 0: made = binary(OP_ADD, i.type, old, by[l], false); break;
      case 1: made = by[l]; break;
      case 2: made = binary(OP_MAX, i.type, old, by[l], false); break;
      case 3: made = old == unsigned_of(i.type, by[l]) ? other[l] : old; break;
      default: made = binary(OP_OR, i.type, old, by[l], false);
    }
    std::memcpy(place, &made, bytes);
    to[l] = old;
    Clock& known = published.try_emplace(address, Clock(warps_of_grid)).first->second;
    join(order == kAcquire || order == kBoth ? warp->seen : warp->acquired, known);
    bool releases = order == kRelease || order == kBoth;
    join(known, releases ? warp->seen : warp->released);
    if (releases) known[warp->in_grid] = warp->now++;
  });
}

// flag: bytes
void Machine::start_copy(const Instruction& i) {
  const Lanes &to = in(0), &to_offset = in(1), &from = in(2), &from_offset = in(3), &size = in(4);
  u32 bytes = i.flag[0];
  each([&](int l) {
    u32 given = static_cast<u32>(std::min<u64>(size[l] & 0xffffffff, bytes));
    Copy copy{to[l] + to_offset[l], from[l] + from_offset[l], bytes, given, false};
    u64 offset = copy.to & kOffsetMask;
    if (offset % bytes) stop("misaligned cp.async");
    if (offset + bytes > launch.shared) stop("cp.async out of bounds of shared memory");
    if (given && copy.from % bytes) stop("misaligned source of cp.async");
    if (given && !memory_of(copy.from, given)) stop("cp.async reads out of bounds");
    if (is_late())
      std::memset(shared_at(copy.to, bytes, true), 0xff, bytes);
    else
      arrive(copy);
    for (u64 c = offset / 2; c < (offset + bytes) / 2; c++) {
      if (launch.is_checked) block->cells[c].is_awaited = true;
    }
    warp->copies.push_back(copy);
  });
}

void Machine::arrive(Copy& copy) {
  u8 buffer[16] = {};
  u64 first = (copy.to & kOffsetMask) / 2, last = first + copy.size / 2;
  if (launch.is_checked)
    for (u64 c = first; c < last; c++) block->cells[c].is_awaited = false;
  if (!copy.is_done) {
    if (copy.from_size)
      std::memcpy(buffer, global_at(copy.from, copy.from_size, false), copy.from_size);
    std::memcpy(shared_at(copy.to, copy.size, true), buffer, copy.size);
    copy.is_done = true;
  }
  if (launch.is_checked)
    for (u64 c = first; c < last; c++) {  // written now, whenever it arrived
      block->cells[c].write = {warp->in_grid, warp->now, current, true, false};
    }
}

void Machine::commit_copies() {
  warp->copy_groups.push_back(std::move(warp->copies));
  warp->copies.clear();
}

// flag: all, else all groups but the last few
void Machine::wait_for_copies(const Instruction& i) {
  size_t keep = i.flag[0] ? 0 : in(0)[first_active()];
  if (i.flag[0]) commit_copies();
  for (; warp->copy_groups.size() > keep; warp->copy_groups.pop_front())
    for (Copy& copy : warp->copy_groups.front()) arrive(copy);
}

}  // namespace ptx
