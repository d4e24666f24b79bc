// Instructions that touch registers alone.
#include "numbers.h"

namespace ptx {
namespace {

float approximated(int op, float x) {
  switch (op) {
    case OP_EX2: return std::exp2(x);
    case OP_LG2: return std::log2(x);
    case OP_RSQRT: return 1 / std::sqrt(x);
    case OP_SQRT: return std::sqrt(x);
    case OP_RCP: return 1 / x;
    case OP_SIN: return std::sin(x);
    case OP_COS: return std::cos(x);
  }
  return std::tanh(x);
}

u64 negated(int type, u64 x) {
  if (is_pair(type)) return x ^ 0x80008000u;
  if (is_float(type)) return x ^ 1ull << (8 * kBytes[type] - 1);
  return unsigned_of(type, -x);
}

u64 absolute(int type, u64 x, bool flush) {
  if (is_pair(type)) return x & 0x7fff7fff;
  if (is_float(type)) {
    x &= low_bits(8 * kBytes[type] - 1);
    return flush && type == T_f32 ? of_f32(flushed(to_f32(x))) : x;
  }
  return unsigned_of(type, std::abs(signed_of(type, x)));
}

u64 extracted(int type, u64 x, u32 from, u32 count) {
  int bits = 8 * kBytes[type];
  x = unsigned_of(type, x);
  u64 sign = is_signed(type) && count && x >> std::min<u32>(from + count - 1, bits - 1) & 1;
  u64 result = 0;
  for (u32 b = 0; b < static_cast<u32>(bits); b++)
    result |= (b < count && from + b < static_cast<u32>(bits) ? x >> (from + b) & 1 : sign) << b;
  return result;
}

u64 permuted(u64 low, u64 high, u64 selector) {
  u64 bytes = (low & 0xffffffff) | high << 32, result = 0;
  for (int b = 0; b < 4; b++) {
    u64 choice = selector >> 4 * b & 15, byte = bytes >> 8 * (choice & 7) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;  // its sign
    result |= byte << 8 * b;
  }
  return result;
}

u64 of_truth_table(u64 a, u64 b, u64 c, u64 table) {
  u64 result = 0;
  for (int i = 0; i < 32; i++) {
    u64 index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
    result |= (table >> index & 1) << i;
  }
  return result;
}

u64 reversed(u64 x) {
  u64 result = 0;
  for (int b = 0; b < 32; b++) result |= (x >> b & 1) << (31 - b);
  return result;
}

}  // namespace

const Lanes& Machine::other_than_register(const Operand& o, int index) {
  Lanes& place = places[index];
  for (int lane = 0; lane < kLanes; lane++)
    place[lane] = o.kind == kConstant ? static_cast<u64>(o.value)
                  : o.kind == kSymbol ? o.value + (static_cast<u64>(block->rank + 1) << kRankShift)
                                      : special(static_cast<int>(o.value), lane);
  return place;
}

u64 Machine::special(int name, int lane) const {
  const auto& size = launch.block;
  u32 thread = warp->id * kLanes + lane;
  switch (name) {
    case SR_tid_x: return thread % size[0];
    case SR_tid_y: return thread / size[0] % size[1];
    case SR_tid_z: return thread / (size[0] * size[1]);
    case SR_ntid_x: case SR_ntid_y: case SR_ntid_z: return size[name - SR_ntid_x];
    case SR_ctaid_x: case SR_ctaid_y: case SR_ctaid_z: return block->id[name - SR_ctaid_x];
    case SR_nctaid_x: case SR_nctaid_y: case SR_nctaid_z: return launch.grid[name - SR_nctaid_x];
    case SR_laneid: return lane;
    case SR_warpid: return warp->id;
    case SR_dynamic_smem_size: return launch.dynamic;
    case SR_is_explicit_cluster: return launch.cluster > 1;
    case SR_cluster_ctarank: case SR_cluster_ctaid_x: return block->rank;
    case SR_cluster_nctarank: case SR_cluster_nctaid_x: return launch.cluster;
    case SR_cluster_ctaid_y: case SR_cluster_ctaid_z: return 0;
    case SR_cluster_nctaid_y: case SR_cluster_nctaid_z: return 1;
    case SR_clusterid_x: return block->id[0] / launch.cluster;
    case SR_lanemask_lt: return low_bits(lane);
    case SR_lanemask_eq: return 1u << lane;
    case SR_lanemask_le: return low_bits(lane + 1);
    // where a cooperative launch finds the counter of its barrier
    case SR_envreg1: return reinterpret_cast<u64>(workspace.data()) >> 32;
    case SR_envreg2: return reinterpret_cast<u64>(workspace.data()) & 0xffffffff;
  }
  throw Stopped("no such special register");
}

void Machine::pack(const Instruction& i) {
  int parts = i.count - 1, bits = 8 * kBytes[i.type] / parts;
  Lanes whole{};
  if (i.op == OP_MOV_PACK) {
    for (int p = 0; p < parts; p++) {
      const Lanes& part = in(1 + p);
      each([&](int l) { whole[l] |= (part[l] & low_bits(bits)) << bits * p; });
    }
    Lanes& to = out(0);
    each([&](int l) { to[l] = whole[l]; });
  } else {
    whole = in(parts);
    for (int p = 0; p < parts; p++) {
      Lanes& to = out(p);
      each([&](int l) { to[l] = whole[l] >> bits * p & low_bits(bits); });
    }
  }
}

// flag: comparison; 0, and 1, or 2, xor 3 with a predicate; 1 flush, 2 a second result, 4 the
// predicate is negated
void Machine::set_predicate(const Instruction& i) {
  int results = i.flag[2] & 2 ? 2 : 1, combine = i.flag[1];
  const Lanes &a = in(results), &b = in(results + 1);
  Lanes with{}, yes, no;
  if (combine) with = in(results + 2);
  each([&](int l) {
    bool x = compare(i.flag[0], i.type, a[l], b[l], i.flag[2] & 1);
    bool z = (with[l] & 1) != (i.flag[2] >> 2 & 1u);
    auto combined = [&](bool y) {
      return combine == 0 ? y : combine == 1 ? y && z : combine == 2 ? y || z : y != z;
    };
    yes[l] = combined(x), no[l] = combined(!x);
  });
  Lanes& to = out(0);
  each([&](int l) { to[l] = yes[l]; });
  if (results == 2) {
    Lanes& other = out(1);
    each([&](int l) { other[l] = no[l]; });
  }
}

void Machine::bits(const Instruction& i) {
  const Lanes& a = in(1);
  const Lanes& b = i.count > 2 ? in(2) : a;
  const Lanes& c = i.count > 3 ? in(3) : a;
  const Lanes& d = i.count > 4 ? in(4) : a;
  Lanes& to = out(0);
  each([&](int l) {
    switch (i.op) {
      case OP_BFE: to[l] = extracted(i.type, a[l], b[l] & 0xff, c[l] & 0xff); break;
      case OP_BFI: {
        u32 at = c[l] & 0xff;
        u64 mask = low_bits(d[l] & 0xff) << at;
        to[l] = unsigned_of(i.type, (b[l] & ~mask) | (a[l] << at & mask));
        break;
      }
      case OP_PRMT: to[l] = permuted(a[l], b[l], c[l]); break;
      case OP_SHF: {  // flag: to the right, clamps
        u64 both = (a[l] & 0xffffffff) | b[l] << 32;
        u32 n = i.flag[1] ? std::min<u32>(c[l], 32) : c[l] & 31;
        to[l] = (i.flag[0] ? both >> n : both << n >> 32) & 0xffffffff;
        break;
      }
      case OP_LOP3: to[l] = of_truth_table(a[l], b[l], c[l], d[l]); break;
      case OP_POPC: to[l] = std::popcount(unsigned_of(i.type, a[l])); break;
      case OP_CLZ:
        to[l] = std::countl_zero(unsigned_of(i.type, a[l])) - (64 - 8 * kBytes[i.type]);
        break;
      default: to[l] = reversed(a[l]);
    }
  });
}

// flag: bfly, up, down, idx; whether there is a predicate of the lane being there
void Machine::shuffle(const Instruction& i) {
  enum { kButterfly, kUp, kDown };
  int results = 1 + i.flag[1];
  const Lanes values = in(results), by = in(results + 1), shape = in(results + 2);
  const Lanes& members = in(results + 3);
  u32 named = 0;
  each([&](int l) { named |= static_cast<u32>(members[l]); });
  if (named & warp->live & ~active) found("shfl.sync names lanes that are elsewhere");
  Lanes& to = out(0);
  Lanes& valid = i.flag[1] ? out(1) : sink;
  each([&](int l) {
    int segment = shape[l] >> 8 & 31, clamp = shape[l] & 31, step = by[l] & 31;
    int least = l & segment, most = least | (clamp & ~segment), from;
    bool is_there = true;
    switch (i.flag[0]) {
      case kButterfly: from = l ^ step, is_there = from <= most; break;
      case kUp: from = l - step, is_there = from >= most; break;  // clamp is then the least lane
      case kDown: from = l + step, is_there = from <= most; break;
      default: from = least | (step & ~segment), is_there = from <= most;
    }
    if (!is_there) from = l;
    if (!(active >> from & 1)) found("shfl.sync reads a lane that does not take part");
    to[l] = values[from] & 0xffffffff;
    valid[l] = is_there;
  });
}

// flag: ballot, any, all; whether the predicate is negated
void Machine::vote(const Instruction& i) {
  const Lanes& a = in(1);
  u32 votes = 0;
  each([&](int l) { votes |= ((a[l] & 1) != static_cast<u64>(i.flag[1]) ? 1u : 0u) << l; });
  Lanes& to = out(0);
  u64 result = i.flag[0] == 0 ? votes : i.flag[0] == 1 ? votes != 0 : votes == active;
  each([&](int l) { to[l] = result; });
}

// Where every lane is a function of its own operands.
void Machine::scalar(const Instruction& i) {
  const Lanes& a = in(1);
  const Lanes& b = i.count > 2 ? in(2) : a;
  const Lanes& c = i.count > 3 ? in(3) : a;
  Lanes& to = out(0);
  auto lanes = [&](auto f) { each([&](int l) { to[l] = f(l); }); };
  bool plain = i.type == T_f32 && !i.flag[0];
  switch (i.op) {
    case OP_MOV: return lanes([&](int l) { return unsigned_of(i.type, a[l]); });
    case OP_CVTA: {  // flag: space; from generic to it
      u64 by = i.flag[0] != kShared ? 0 : i.flag[1] ? -kSharedWindow : kSharedWindow;
      return lanes([&](int l) { return a[l] + by; });
    }
    case OP_ADD:
      if (plain) return lanes([&](int l) { return of_f32(to_f32(a[l]) + to_f32(b[l])); });
      break;
    case OP_SUB:
      if (plain) return lanes([&](int l) { return of_f32(to_f32(a[l]) - to_f32(b[l])); });
      break;
    case OP_MUL:
      if (plain) return lanes([&](int l) { return of_f32(to_f32(a[l]) * to_f32(b[l])); });
      break;
    case OP_MUL_WIDE:
      return lanes([&](int l) {
        u64 wide = widened(i.type, a[l]) * widened(i.type, b[l]);
        return kBytes[i.type] == 2 ? wide & 0xffffffff : wide;
      });
    case OP_MAD_WIDE:
      return lanes([&](int l) { return widened(i.type, a[l]) * widened(i.type, b[l]) + c[l]; });
    case OP_MAD_LO:
      return lanes([&](int l) { return unsigned_of(i.type, a[l] * b[l] + c[l]); });
    case OP_FMA:  // flag: flush, .rm
      if (plain && !i.flag[1])
        return lanes(
            [&](int l) { return of_f32(std::fma(to_f32(a[l]), to_f32(b[l]), to_f32(c[l]))); });
      return lanes([&](int l) { return fused(i.type, a[l], b[l], c[l], i.flag[0], i.flag[1]); });
    case OP_NEG: return lanes([&](int l) { return negated(i.type, a[l]); });
    case OP_ABS: return lanes([&](int l) { return absolute(i.type, a[l], i.flag[0]); });
    case OP_NOT: return lanes([&](int l) { return unsigned_of(i.type, ~a[l]); });
    case OP_EX2: case OP_LG2: case OP_RSQRT: case OP_SQRT: case OP_RCP: case OP_TANH:
    case OP_SIN: case OP_COS:
      return lanes([&](int l) {
        float x = to_f32(a[l]);
        return of_f32(i.flag[0] ? flushed(approximated(i.op, flushed(x))) : approximated(i.op, x));
      });
    case OP_COPYSIGN:
      return lanes([&](int l) { return (b[l] & 0x7fffffff) | (a[l] & 0x80000000u); });
    case OP_SELP: return lanes([&](int l) { return c[l] & 1 ? a[l] : b[l]; });
    case OP_CVT:  // flag: rounding, saturates
      return lanes([&](int l) { return convert(i.type, i.from, a[l], i.flag[0], i.flag[1]); });
    case OP_CVT_PACK: {
      int half = half_of(i.type);
      return lanes([&](int l) {
        return of_float(half, to_f32(a[l])) << 16 | of_float(half, to_f32(b[l]));
      });
    }
    case OP_MAPA: {  // flag: of a generic address
      u64 window = i.flag[0] ? kSharedWindow : 0;
      return lanes([&](int l) {
        return ((a[l] - window) & kOffsetMask) + ((b[l] + 1) << kRankShift) + window;
      });
    }
    case OP_REDUX: {  // flag: the operation
      u64 all = unsigned_of(i.type, a[first_active()]);
      for (u32 l = first_active() + 1; l < kLanes; l++)
        if (active >> l & 1) all = binary(i.flag[0], i.type, all, a[l], false);
      return lanes([&](int) { return all; });
    }
  }
  lanes([&](int l) { return binary(i.op, i.type, a[l], b[l], i.flag[0]); });
}

}  // namespace ptx
