// linear on the tile registers of AMX; called for bfloat16 alone. A block of 32 rows of x and a
// panel of 32 rows of the weights make four tiles of sums; a step along K loads two tiles of x, as
// it lies, and two of the panel (see linear_parts.h), and multiplies four times.
//
// Per multiplication (16 cycles) that is one tile, and the second-level cache does not deliver both
// operands' at this rate. Therefore K is cut into parts of which a panel takes half of the
// first-level cache, several panels share the block of x that was just read, and sums wait in
// memory between two parts. The parts depend on K alone: results depend neither on the panels
// that go together nor on the threads.
#include <algorithm>
#include <cstring>

#include "accelrt/parallel.h"
#include "accelrt/tile_block.h"
#include "kernels/linear/linear_parts.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

using namespace linear_parts;

constexpr int64_t kRows = kBlockRows;
static_assert(kColumns == kBlockColumns);
constexpr int64_t kPart = 384;  // along K, at most: 24 KiB of a panel
constexpr int64_t kPartPanel = kPart / 2 * kColumns;
// Rows of x in a piece of work, at most: many, to make up for its panels. Its sums, with those of
// kPanels panels, are 352 KiB.
constexpr int64_t kChunk = 22 * kRows;
constexpr int64_t kPanels = 4;
// A copied row of x: its lines of the cache are not those of the next one.
constexpr int64_t kCopyStride = kPart + kTileDepth;

// How the product is cut into pieces.
struct Plan {
  explicit Plan(const LinearParams& p) {
    width = panel_columns(p);
    all_panels = (p.columns + width - 1) / width;
    parts = std::max<int64_t>(1, (p.depth + kPart - 1) / kPart);
    part = round_up((p.depth + parts - 1) / parts, kTileDepth);
    const int64_t chunks = (p.rows + kChunk - 1) / kChunk;
    chunk = round_up((p.rows + chunks - 1) / chunks, kRows);
    // Enough pieces for the threads to share, whatever their number.
    constexpr int64_t kEnough = 64;
    panels = kPanels;
    while (panels > 1 && (all_panels + panels - 1) / panels * chunks < kEnough) panels /= 2;
    groups = (all_panels + panels - 1) / panels;
    pieces = groups * chunks;
  }
  int64_t width;       // columns of a panel
  int64_t all_panels;  // of the weights
  int64_t parts;       // of K
  int64_t part;        // elements of one, but for the last
  int64_t chunk;       // rows of a piece
  int64_t panels;      // of a piece
  int64_t groups;      // of panels
  int64_t pieces;
};

// sums[32, 32] += x panel over `steps` tiles along K. x has kRowTiles tiles of rows, `stride` bytes
// apart; the first part finds nothing in the sums.
template <int kRowTiles>
void multiply(Tiles& tiles, const char* x, int64_t stride, const float* panel, int64_t steps,
              bool first, float* sums) {
  begin_block<kRowTiles>(tiles, first, sums);
  add_to_block<kRowTiles>(tiles, x, x + kTileRows * stride, stride, panel, steps);
  end_block<kRowTiles>(tiles, sums);
}

// `count` rows of `depth` elements to rows of whole tiles, kCopyStride apart, with zeros past them.
void copy_rows(const bfloat16* x, int64_t stride, int64_t count, int64_t depth, bfloat16* to) {
  const int64_t padded = round_up(depth, kTileDepth);
  const int64_t rows = round_up(count, kTileRows);
  for (int64_t r = 0; r < rows; ++r) {
    bfloat16* const row = to + r * kCopyStride;
    const int64_t present = r < count ? depth : 0;
    if (present > 0) {
      std::memcpy(row, x + r * stride, static_cast<size_t>(present) * sizeof(bfloat16));
    }
    std::memset(row + present, 0, static_cast<size_t>(padded - present) * sizeof(bfloat16));
  }
}

// Memory of a thread.
struct Scratch {
  explicit Scratch(const Plan& plan) {
    // With one part of K the sums of a block are finished at once.
    const int64_t blocks = plan.parts == 1 ? 1 : plan.chunk / kRows;
    const int64_t copy_size = kRows * kCopyStride * static_cast<int64_t>(sizeof(bfloat16)) / 4;
    const int64_t panel_size = plan.panels * kPartPanel;
    lines = make_lines(panel_size + copy_size + blocks * plan.panels * kBlockSums);
    panels = lines[0].values;
    copy = reinterpret_cast<bfloat16*>(panels + panel_size);
    sums = panels + panel_size + copy_size;
  }
  std::unique_ptr<Line[]> lines;
  float* panels;  // [panels][kPartPanel]
  bfloat16* copy;
  float* sums;  // [blocks][panels][kBlockSums]
};

void finish_block(const LinearParams& p, int64_t row, int64_t rows, int64_t first,
                  const float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    VFloat one[kVecs];
    for (int v = 0; v < kVecs; ++v) one[v] = load(sums + r * kColumns + v * kLanes).v;
    finish<bfloat16>(p, row + r, first, one);
  }
}

// Rows [begin, end) of x with the panels from the column `first`.
void compute(const LinearParams& p, const Plan& plan, int64_t first, int64_t begin, int64_t end,
             Tiles& tiles, const Scratch& scratch) {
  const int64_t last = round_up(p.columns, plan.width);
  const int64_t panels = std::min(plan.panels, (last - first) / plan.width);
  for (int64_t part = 0; part < plan.parts; ++part) {
    const int64_t from = part * plan.part;
    const int64_t depth = std::min(plan.part, p.depth - from);
    const int64_t steps = (depth + kTileDepth - 1) / kTileDepth;
    for (int64_t i = 0; i < panels; ++i) {
      pack<bfloat16>(p, first + i * plan.width, from, from + depth,
                     scratch.panels + i * kPartPanel);
    }
    for (int64_t row = begin; row < end; row += kRows) {
      const int64_t rows = std::min(kRows, end - row);
      const bfloat16* x = static_cast<const bfloat16*>(p.x) + row * p.x_stride + from;
      int64_t stride = p.x_stride;
      if (rows % kTileRows != 0 || depth % kTileDepth != 0) {
        copy_rows(x, stride, rows, depth, scratch.copy);
        x = scratch.copy;
        stride = kCopyStride;
      }
      const int64_t block = plan.parts == 1 ? 0 : (row - begin) / kRows;
      for (int64_t i = 0; i < panels; ++i) {
        float* const sums = scratch.sums + (block * plan.panels + i) * kBlockSums;
        const auto run = rows > kTileRows ? multiply<2> : multiply<1>;
        run(tiles, reinterpret_cast<const char*>(x), stride * int64_t{sizeof(bfloat16)},
            scratch.panels + i * kPartPanel, steps, part == 0, sums);
        if (part + 1 == plan.parts) finish_block(p, row, rows, first + i * plan.width, sums);
      }
    }
  }
}

}  // namespace

void linear_cpu(const LinearParams& p) {
  const Plan plan(p);
  // Small products stay on one thread.
  constexpr int64_t kOperations = 1 << 20;
  const int64_t each = std::min(p.rows, plan.chunk) * plan.panels * kColumns * p.depth;
  parallel_for(0, plan.pieces, kOperations / std::max<int64_t>(1, each),
               [&](int64_t begin, int64_t end) {
                 const Scratch scratch(plan);
                 Tiles tiles;
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t first = i % plan.groups * plan.panels * plan.width;
                   const int64_t row = i / plan.groups * plan.chunk;
                   compute(p, plan, first, row, std::min(row + plan.chunk, p.rows), tiles, scratch);
                 }
               });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
