// Every number of every tile has one thread that holds it, and one that loads it. Prints what fails.
#include <cstdint>
#include <cstdio>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "aligned_residual_read.h"
#include "write_bwd.h"
#include "momentum_scan.h"
#include "swizzle.h"

namespace {

int failures = 0;

void expect(bool ok, const char* what, int64_t detail) {
  if (ok) return;
  std::printf("%s: %ld\n", what, static_cast<long>(detail));
  failures++;
}

using Owners = std::map<std::pair<int, int>, int>;

void expect_once(const Owners& owners, int rows, int columns, const char* what) {
  bool once = owners.size() == static_cast<size_t>(rows) * columns;
  for (const auto& [at, count] : owners)
    once &= count == 1 && at.first >= 0 && at.first < rows && at.second >= 0 && at.second < columns;
  expect(once, what, columns);
}

// The product of `rows` by `columns` that all warps of a block share.
void check_product(int rows, int columns) {
  using namespace mal::memory;
  int groups = rows / 16, width = columns * groups / kWarps;
  Owners owners;
  for (int warp = 0; warp < kWarps; warp++)
    for (int lane = 0; lane < 32; lane++)
      for (int n = 0; n < width / 8; n++)
        for (int i = 0; i < 4; i++) {
          Place part = part_of(warp, groups, width), p = accumulator_of(lane, i);
          owners[{part.row + p.row, part.column + 8 * n + p.column}]++;
        }
  expect_once(owners, rows, columns, "a product is not shared out");
}

void check_memory() {
  using namespace mal::memory;
  for (int features : {64, 128}) {
    int units = units_for(features);
    check_product(kTokens, features);
    check_product(kTokens, units);
    check_product(kTokens, kTokens);
    check_product(features, units);
    check_product(units, features);
    Owners copies, shares;
    for (int thread = 0; thread < kThreads; thread++) {
      for (int i = 0; i < kTokens * features / 8 / kThreads; i++)
        for (int j = 0; j < 8; j++) {
          Place p = copy_of(thread, i, features);
          copies[{p.row, p.column + j}]++;
        }
      for (int i = 0; i < features / kSharing; i++) {
        Place p = share_of(thread, i);
        shares[{p.row, p.column}]++;
        expect(p.row == thread / kSharing, "a thread takes two tokens", thread);
        expect(i % 4 == p.column % 4, "four numbers are not next to each other", i);
      }
    }
    expect_once(copies, kTokens, features, "a tile is not copied");
    expect_once(shares, kTokens, features, "a tile of float32 is not shared out");
  }
  for (bool straight : {false, true}) {
    Owners rows;
    for (int lane = 0; lane < 32; lane++) {
      Place p = matrix_row_of(lane, straight);
      for (int j = 0; j < 8; j++) rows[{p.row, p.column + j}]++;
    }
    expect_once(rows, 16, 16, "a fragment is not loaded");
  }
  for (int blocks = 1; blocks <= 16; blocks *= 2)
    for (int token = 0; token < kTokens; token++) {
      int block = block_of(token, blocks);
      expect(block >= 0 && block < blocks, "no block stores a token", token);
      bool same = block == block_of(token / 8 * 8, blocks);
      expect(same, "a part of a warp stores its tokens", token);
    }
  expect(blocks_for(1, 64) == 1 && blocks_for(65, 64) == 2 && blocks_for(512, 64) == 8, "blocks", 0);
  expect(blocks_for(513, 64) == 16 && blocks_for(512, 32) == 16, "blocks of a large cluster", 0);
  expect(blocks_for(1025, 64) == 0, "more blocks than a cluster has", 1025);
}

// A tile of 16-bit numbers in shared memory.
template <int kRows, int kColumns>
void check_tile() {
  using Tile = mal::Swizzle<kRows, kColumns>;
  std::set<int> places;
  for (int row = 0; row < kRows; row++)
    for (int column = 0; column < kColumns; column++) {
      int at = Tile::at(row, column), chunk = Tile::at(row, column / 8 * 8);
      places.insert(at);
      expect(at >= 0 && at < kRows * kColumns, "a number outside its tile", at);
      expect(at == chunk + column % 8, "16 bytes are not whole", column);
    }
  expect(places.size() == kRows * kColumns, "two numbers in one place", kColumns);
  for (int row = 0; row < kRows; row += 8)
    for (int column = 0; column < kColumns; column += 8) {
      // eight rows that ldmatrix reads at once, and the pairs of an accumulator that a warp stores
      std::set<int> banks, stored;
      for (int lane = 0; lane < 32; lane++) {
        auto p = mal::memory::accumulator_of(lane, 0);
        banks.insert((Tile::at(row + lane / 4, column) / 2 + lane % 4) % 32);
        stored.insert(Tile::at(row + p.row, column + p.column) / 2 % 32);
      }
      expect(banks.size() == 32, "ldmatrix meets a bank twice", column);
      expect(stored.size() == 32, "an accumulator meets a bank twice", column);
    }
}

// What wgmma reads by a descriptor, as the PTX ISA says (Matrix Descriptor Format; Strides): the
// operand [size, 16] stored by its k, or by its other index, is what stands in the tile.
template <int kRows, int kColumns>
void check_operand(int size, int row, int column, bool is_major_k) {
  using Tile = mal::Swizzle<kRows, kColumns>;
  const int address = 3 * 1024;
  const uint64_t bits = Tile::descriptor(address, row, column);
  auto field = [&](int first) { return static_cast<int>(bits >> first & 0x3FFF) * 16; };
  const int start = field(0), leading = field(16), stride = field(32), mode = bits >> 62;
  const int width = mode == 1 ? 128 : mode == 2 ? 64 : 32;  // bytes
  expect(mode != 0 && (bits & 0x3FFEC000C000C000) == 0, "a descriptor", mode);
  expect(start / 128 % (width / 16) == 0, "an operand begins inside a pattern", start);
  for (int i = 0; i < size; i++)
    for (int k = 0; k < 16; k++) {
      int inner = is_major_k ? k : i, outer = is_major_k ? i : k;
      int from = start + outer / 8 * stride + outer % 8 * width;
      from += is_major_k ? 2 * inner : 2 * inner / width * leading + 2 * inner % width;
      from ^= from / 128 % (width / 16) * 16;
      int place = is_major_k ? Tile::at(row + i, column + k) : Tile::at(row + k, column + i);
      expect(from == address + 2 * place, "wgmma reads another number", size);
    }
}

// Every operand of 16, 32 or 64 rows or columns that lies in a tile at a multiple of its size; 128:
// beyond what is used, over two parts of a tile.
template <int kRows, int kColumns>
void check_operands() {
  check_tile<kRows, kColumns>();
  for (int size : {16, 32, 64, 128})
    for (int k = 0; k < 128; k += 16)
      for (int i = 0; i < 128; i += size) {
        if (i + size <= kRows && k < kColumns) check_operand<kRows, kColumns>(size, i, k, true);
        if (i + size <= kColumns && k < kRows) check_operand<kRows, kColumns>(size, k, i, false);
      }
}

void check_tiles_of_memory() {
  check_operands<64, 64>();
  check_operands<64, 128>();
  check_operands<64, 32>();
  check_operands<32, 128>();
  check_operands<128, 32>();
}

// Tiles of a row, one after the other, are its tokens, and none spans two chunks; and the backward
// takes the same ones from the last to the first.
void check_tiles(int length, int start, int chunk) {
  int token = 0, place = start, tiles = 0, of_chunk = 0;
  while (token < length) {
    int count = mal::memory::tile_length(token, place, chunk, length);
    auto back = mal::memory::last_tile(token + count, start, chunk);
    expect(back.token == token && back.count == count, "a tile from behind", token);
    auto ahead = mal::memory::tile_of_row(tiles, length, start, chunk);
    expect(ahead.token == token && ahead.count == count, "a tile by its number", token);
    expect(ahead.chunk == back.chunk && ahead.index == back.index, "its place", token);
    expect(back.chunk == (start + token) / chunk && back.index == of_chunk, "its place", token);
    tiles++, of_chunk = (place + count) % chunk ? of_chunk + 1 : 0;
    bool ok = count > 0 && count <= mal::memory::kTokens && place + count <= chunk;
    expect(ok && token + count <= length, "a tile", token);
    if (!ok) return;
    token += count, place = (place + count) % chunk;
  }
  expect(tiles == mal::memory::tiles_of_row(length, start, chunk), "tiles of a row", length);
}

void check_scan(int64_t features, int64_t tokens, int each) {
  using namespace mal::scan;
  Shape shape = shape_of(features);
  expect(shape.lanes * shape.steps == kThreads, "threads", features);
  expect(shape.blocks == (features + 511) / 512, "blocks of 512 features", features);
  std::vector<int> of_feature(features), of_token(tokens);
  for (int64_t block = 0; block < shape.blocks; block++)
    for (int lane = 0; lane < shape.lanes; lane++)
      for (int j = 0; j < kFeatures; j++) {
        int64_t feature = (block * shape.lanes + lane) * kFeatures + j;
        if (feature < features) of_feature[feature]++;
      }
  for (int64_t tile = 0; tile < tokens; tile += each * shape.steps)
    for (int step = 0; step < shape.steps; step++)
      for (int i = 0; i < each; i++) {
        int64_t token = token_of(tile, step, i, each);
        if (token < tokens) of_token[token]++;
      }
  for (int count : of_feature) expect(count == 1, "a feature", features);
  for (int count : of_token) expect(count == 1, "a token", tokens);
  std::set<std::vector<int64_t>> places;
  for (int64_t index = 0; index < shape.blocks * 6; index++) {
    Place p = place_of(index, shape.blocks, 3);
    expect(p.row < 2 && p.head < 3 && p.block < shape.blocks, "a place", index);
    places.insert({p.row, p.head, p.block});
  }
  expect(places.size() == static_cast<size_t>(shape.blocks * 6), "places", features);
}

// A tile of a projection, a slab of its operands and the numbers of a token, among the threads.
void check_aligned_tiles() {
  using namespace mal::aligned;
  using mal::memory::accumulator_of;
  Owners product, shares, fragment;
  for (int thread = 0; thread < kThreads; thread++) {
    Place part = part_of(thread / 32);
    for (int i = 0; i < 16; i++) {
      Place p = accumulator_of(thread % 32, i % 4);
      product[{part.row + i / 8 * 16 + p.row, part.column + i / 4 % 2 * 8 + p.column}]++;
    }
    for (int i = 0; i < kFeatures / kSharing; i++) {
      Place p = share_of(thread, i);
      shares[{p.row, p.column}]++;
      expect(p.row == thread / kSharing, "a thread reads two tokens", thread);
      expect(i % 4 == p.column % 4, "four numbers are not next to each other", i);
    }
  }
  expect_once(product, kRows, kColumns, "a projection is not shared out");
  expect_once(shares, kTokens, kFeatures, "a head is not shared out");
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      fragment[{pair_of(lane).row, pair_of(lane).column + i / 2 * 8 + i % 2}]++;
  expect_once(fragment, 8, 16, "a fragment of b is not loaded");
  for (int numbers : {4, 8}) {  // in 16 bytes
    Owners copies;
    for (int thread = 0; thread < kThreads; thread++)
      for (int i = 0; i < kRows * kDepth / numbers / kThreads; i++)
        for (int j = 0; j < numbers; j++) {
          Place p = copy_of(thread, i, numbers);
          copies[{p.row, p.column + j}]++;
        }
    expect_once(copies, kRows, kDepth, "a slab is not copied");
    // the lanes that load their pairs of b at once, 128 bytes in all, meet different banks
    int words = numbers == 4 ? 1 : 2;  // numbers of 4 bytes
    std::set<int> banks;
    for (int lane = 0; lane < 16 * words; lane++)
      for (int j = 0; j < 2; j += words)
        banks.insert((pair_of(lane).row * (kDepth + kPad) + pair_of(lane).column + j) / words % 32);
    expect(banks.size() == 32, "a pair of b meets a bank twice", numbers);
  }
}

// Eight rows that ldmatrix reads at once lie in different banks of 4 bytes.
void check_padding() {
  using namespace mal::aligned;
  for (int width : {kDepth, kFeatures, kUnits}) {
    std::set<int> banks;
    for (int row = 0; row < 8; row++)
      for (int word = 0; word < 4; word++) banks.insert((row * (width + kPad) / 2 + word) % 32);
    expect(banks.size() == 32, "ldmatrix meets a bank twice", width);
  }
}

// The items of every stage are all there is to do, and the parts of a sum the whole of it.
void check_aligned_items(int tokens, int width, int heads, int dim, int splits) {
  using namespace mal::aligned;
  Stages stages = stages_of(tokens, width, heads, dim, splits);
  int tiles = tiles_of(tokens, kRows), groups = tiles_of(tokens, kTokens);
  int columns = tiles_of(heads * dim, kColumns), slabs = tiles_of(width, kDepth);
  expect(tiles * kRows >= tokens && groups * kTokens >= tokens, "tokens without a tile", tokens);
  expect(columns * kColumns >= heads * dim && slabs * kDepth >= width, "columns", width);
  auto count = [](int64_t items, int of_tiles, int of_columns) {
    std::set<std::vector<int>> seen;
    for (int index = 0; index < items; index++) {
      Item item = item_of(index, of_tiles, of_columns);
      expect(item.tile < of_tiles && item.column < of_columns, "an item", index);
      seen.insert({item.tile, item.column, item.split});
    }
    return static_cast<int>(seen.size());
  };
  expect(count(stages.projections, tiles, 2 * columns) == tiles * 2 * columns * splits, "parts", 0);
  expect(count(stages.reads, groups, heads) == groups * heads, "reads", heads);
  expect(count(stages.additions, tiles, slabs) == tiles * slabs, "additions", width);
  expect(first_slab(0, splits, slabs) == 0, "the first slab", splits);
  expect(first_slab(splits, splits, slabs) == slabs, "the last slab", splits);
  for (int split = 0; split < splits; split++) {
    int many = first_slab(split + 1, splits, slabs) - first_slab(split, splits, slabs);
    expect(many == slabs / splits || many == slabs / splits + 1, "unequal parts", split);
  }
}

}  // namespace

int main() {
  check_memory();
  check_tiles_of_memory();
  check_aligned_tiles();
  check_padding();
  for (int tokens : {1, 16, 17, 64, 65, 375})
    for (int width : {8, 64, 72, 4096})
      for (int splits : {1, 3, 16}) check_aligned_items(tokens, width, 3, 40, splits);
  for (int length : {0, 1, 63, 64, 65, 200})
    for (int chunk : {1, 16, 64, 100, 1000})
      for (int start : {0, 1, chunk - 1}) check_tiles(length, start % chunk, chunk);
  for (int64_t features : {1, 7, 16, 17, 64, 511, 512, 513, 8192})
    for (int64_t tokens : {1, 8, 100, 1025})
      for (int each : {4, 8}) check_scan(features, tokens, each);
  return failures != 0;
}
