// Tensor cores, and the matrices that a warp loads and stores.
#include "numbers.h"

namespace ptx {
namespace {

constexpr int kK = 16;  // of every product here

// A row or column pair of 16-bit numbers in a register: number `half` of it.
float part_of(u64 x, int half, bool is_bf16) {
  return is_bf16 ? to_bf16(x >> 16 * half) : to_f16(x >> 16 * half);
}

// a[16, 16] of m16n8k16 and of wgmma: what lane and register hold row, k.
struct Place {
  int lane, number, half;
};
Place place_of_a(int row, int k) {
  return {row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2};
}

}  // namespace

// flag: how many; transposed
void Machine::load_matrices(const Instruction& i) {
  if (active != kAll) stop("ldmatrix under divergence");
  int count = i.flag[0];
  Lanes from = in(count);
  const Lanes& offset = in(count + 1);
  tally.shared_loads++;
  u16 rows[4][8][8];
  for (int m = 0; m < count; m++)
    for (int r = 0; r < 8; r++) {
      u64 address = static_cast<u32>(from[8 * m + r] + offset[8 * m + r]);
      std::memcpy(rows[m][r], shared_at(address, 16, false), 16);
    }
  for (int m = 0; m < count; m++) {
    Lanes& to = out(m);
    for (int l = 0; l < kLanes; l++) {
      int row = l / 4, column = l % 4 * 2;
      to[l] = i.flag[1] ? rows[m][column][row] | static_cast<u32>(rows[m][column + 1][row]) << 16
                        : rows[m][row][column] | static_cast<u32>(rows[m][row][column + 1]) << 16;
    }
  }
}

void Machine::store_matrices(const Instruction& i) {
  if (active != kAll) stop("stmatrix under divergence");
  int count = i.flag[0];
  const Lanes &to = in(0), &offset = in(1);
  tally.shared_stores++;
  u16 rows[4][8][8];
  for (int m = 0; m < count; m++) {
    const Lanes& from = in(2 + m);
    for (int l = 0; l < kLanes; l++)
      for (int half = 0; half < 2; half++) {
        int row = l / 4, column = l % 4 * 2 + half;
        u16 x = static_cast<u16>(from[l] >> 16 * half);
        (i.flag[1] ? rows[m][column][row] : rows[m][row][column]) = x;
      }
  }
  for (int m = 0; m < count; m++)
    for (int r = 0; r < 8; r++) {
      const u8* value = reinterpret_cast<const u8*>(rows[m][r]);
      u64 address = static_cast<u32>(to[8 * m + r] + offset[8 * m + r]);
      std::memcpy(shared_at(address, 16, true, value), value, 16);
    }
}

// mma.m16n8k16: d[4], a[4], b[2], c[4]
void Machine::warp_product(const Instruction& i) {
  if (active != kAll) stop("mma under divergence");
  tally.tensor_flops += 2 * 16 * 8 * kK;
  bool is_bf16 = i.type == T_bf16;
  float a[16][kK], b[kK][8];
  std::array<Lanes, 4> c;
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < kK; k++) {
      Place p = place_of_a(row, k);
      a[row][k] = part_of(in(4 + p.number)[p.lane], p.half, is_bf16);
    }
  for (int k = 0; k < kK; k++)
    for (int n = 0; n < 8; n++) b[k][n] = part_of(in(8 + k / 8)[n * 4 + k % 8 / 2], k % 2, is_bf16);
  for (int r = 0; r < 4; r++) c[r] = in(10 + r);
  for (int l = 0; l < kLanes; l++)
    for (int r = 0; r < 4; r++) {
      int row = l / 4 + 8 * (r / 2), n = l % 4 * 2 + r % 2;
      float sum = to_f32(c[r][l]);
      for (int k = 0; k < kK; k++) sum += a[row][k] * b[k][n];
      c[r][l] = of_f32(sum);
    }
  for (int r = 0; r < 4; r++) out(r) = c[r];
}

// --- wgmma --------------------------------------------------------------------------------------

// Where in the block's shared memory number [major, k] of an operand stands, by its descriptor.
// `is_transposed`: numbers next to each other differ in major, not in k.
u32 Machine::element_at(u64 descriptor, bool is_transposed, int major, int k) const {
  auto field = [&](int from) { return (descriptor >> from & 0x3fff) << 4; };
  u64 start = field(0), leading = field(16), stride = field(32);
  int mode = static_cast<int>(descriptor >> 62);  // none, 128, 64 and 32 bytes
  int width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16, numbers = width / 2;
  u64 address = start;
  if (!is_transposed)
    address += major / 8 * stride + major % 8 * width +
               (mode ? 2 * k : k / 8 * leading + k % 8 * 2);
  else if (mode)
    address += major / numbers * leading + k / 8 * stride + k % 8 * width + major % numbers * 2;
  else
    address += major / 8 * stride + k / 8 * leading + k % 8 * 16 + major % 8 * 2;
  int swizzled = mode == 1 ? 7 : mode == 2 ? 3 : mode == 3 ? 1 : 0;
  return static_cast<u32>(address ^ (address >> 7 & swizzled) << 4);
}

// flag: n; a in registers. Operands: d[n / 2], a[4] or a, b, adds, signs of a and b, transposed a
// (where it is in memory) and b
void Machine::start_product(const Instruction& i) {
  if (active != kAll) stop("wgmma under divergence");
  tally.tensor_flops += 2 * 16 * i.flag[0] * kK;  // of this warp
  int results = i.flag[0] / 2, b = results + (i.flag[1] ? 4 : 1);
  check_registers(i, b);
  Product product{current, 0, in(b)[0], (in(b + 1)[0] & 1) != 0, false, {}, {}};
  if (i.flag[1])
    for (int r = 0; r < 4; r++) product.fragment[r] = in(results + r);
  else
    product.a = in(results)[0];
  for (int r = 0; r < results; r++) warp->accumulates[operand(r).value]++, warp->under_way++;
  for (int r = results; i.flag[1] && r < b; r++) warp->feeds[operand(r).value]++, warp->under_way++;
  list_cells(product);
  if (!is_late()) compute(product);
  if (launch.is_checked)
    for (u32 c : product.cells) {
      Cell& cell = block->cells[c];
      if (!cell.is_written) found("wgmma reads shared memory that nothing wrote");
      u32 fenced = cell.write.warp < 0                 ? kAll
                   : cell.write.warp == warp->in_grid ? warp->fenced_at
                                                      : warp->fenced[cell.write.warp];
      if (cell.write.clock > fenced) {
        if (cell.write.is_copy)
          tally.unfenced_copies++;
        else
          found("wgmma reads shared memory without fence.proxy.async");
      }
      touch(cell, false, "wgmma");
      cell.products++;
    }
  warp->products.push_back(std::move(product));
}

// Whether wgmma.fence stands between other writes of its registers and this wgmma.
void Machine::check_registers(const Instruction& i, int inputs) {
  for (int r = 0; r < inputs; r++) {
    const Operand& o = operand(r);
    bool is_descriptor = r >= i.flag[0] / 2 && !i.flag[1];
    if (o.kind == kRegister && !is_descriptor && warp->changed[o.value] > warp->product_fence)
      found("a register of wgmma was written without wgmma.fence since");
  }
}

void Machine::list_cells(Product& p) {
  const Instruction& i = launch.code[p.instruction];
  int n = i.flag[0], signs = n / 2 + (i.flag[1] ? 6 : 3), row = warp->id % 4 * 16;
  bool by_column = !i.flag[1] && operand(signs + 2).value;
  bool b_by_row = operand(signs + (i.flag[1] ? 2 : 3)).value != 0;
  for (int r = 0; r < 16 && !i.flag[1]; r++)
    for (int k = 0; k < kK; k++) p.cells.push_back(element_at(p.a, by_column, row + r, k) / 2);
  for (int c = 0; c < n; c++)
    for (int k = 0; k < kK; k++) p.cells.push_back(element_at(p.b, b_by_row, c, k) / 2);
  for (u32 c : p.cells)
    if (2 * c + 2 > launch.shared) stop("wgmma reads out of bounds of shared memory");
}

void Machine::compute(Product& p) {
  const Instruction& i = launch.code[p.instruction];
  const Operand* o = &launch.operands[i.first];
  bool is_bf16 = i.type == T_bf16;
  int n = i.flag[0], signs = n / 2 + (i.flag[1] ? 6 : 3);
  float sign = static_cast<float>(o[signs].value * o[signs + 1].value);
  auto next = [&, at = p.cells.begin()]() mutable {
    u16 x;
    std::memcpy(&x, &block->bytes[2 * *at++], 2);
    return is_bf16 ? to_bf16(x) : to_f16(x);
  };
  float a[16][kK], b[256][kK];
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < kK; k++) {
      Place place = place_of_a(r, k);
      u64 held = p.fragment[place.number][place.lane];
      a[r][k] = sign * (i.flag[1] ? part_of(held, place.half, is_bf16) : next());
    }
  for (int c = 0; c < n; c++)
    for (int k = 0; k < kK; k++) b[c][k] = next();
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < n; c++) {
      float sum = 0;
      for (int k = 0; k < kK; k++) sum += a[r][k] * b[c][k];
      int lane = r % 8 * 4 + c % 8 / 2, number = c / 8 * 4 + r / 8 * 2 + c % 2;
      u64& to = warp->registers[o[number].value][lane];
      to = of_f32((p.adds ? to_f32(to) : 0.f) + sum);
    }
  p.is_done = true;
}

void Machine::commit_products() {
  warp->product_groups.push_back(std::move(warp->products));
  warp->products.clear();
}

void Machine::wait_for_products(size_t keep) {
  for (; warp->product_groups.size() > keep; warp->product_groups.pop_front())
    for (Product& p : warp->product_groups.front()) {
      const Instruction& i = launch.code[p.instruction];
      const Operand* o = &launch.operands[i.first];
      int results = i.flag[0] / 2;
      if (!p.is_done) compute(p);
      for (int r = 0; r < results; r++) warp->accumulates[o[r].value]--, warp->under_way--;
      for (int r = results; i.flag[1] && r < results + 4; r++)
        warp->feeds[o[r].value]--, warp->under_way--;
      if (!launch.is_checked) continue;
      for (u32 c : p.cells) {
        block->cells[c].products--;
        touch(block->cells[c], false, "wgmma");
      }
    }
}

}  // namespace ptx
