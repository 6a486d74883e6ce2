// linear on the tile registers of AMX; called for bfloat16 alone. A block of 32 rows of x and a
// panel of 32 rows of the weights make four tiles of sums; a step along K loads two tiles of x and
// two of the panel, and multiplies four times.
//
// Per multiplication (16 cycles) that is one tile, and the second-level cache does not deliver both
// operands' at this rate. Therefore K is cut into parts of which a panel takes half of the
// first-level cache, several panels share the block of x that was just read, and sums wait in
// memory between two parts. The parts depend on K alone: results depend neither on the panels
// that go together nor on the threads.
//
// Rows that take up to kLinearRowsBytes are copied at first, and a thread packs panels as it needs
// them. With more rows the weights are packed first, as many of them at a time as kLinearPackBytes
// take, and a thread copies a chunk of the rows for all its panels. Rows as they lie are often a
// power of two apart and crowd each other out of the cache.
#include <algorithm>
#include <cstring>

#include "accelrt/parallel.h"
#include "accelrt/tile_block.h"
#include "accelrt/tile_pack.h"
#include "kernels/linear/linear_parts.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

using namespace linear_parts;

static_assert(kColumns == kBlockColumns);
constexpr int64_t kPart = 384;  // along K, at most: 24 KiB of a panel
// Rows of x in a chunk: as many as the second-level cache takes, and so many that the panels which
// pass by them come from further away in time.
constexpr int64_t kChunkBytes = 5 << 18;
constexpr int64_t kFewestRows = 8 * kBlockRows;
constexpr int64_t kMostRows = 22 * kBlockRows;
constexpr int64_t kFewRows = 16 * kBlockRows;
// Of the sums that wait between two parts.
constexpr int64_t kSumsBytes = 352 << 10;
constexpr int64_t kLine = kTileDepth;  // elements of a line of the cache

// How the product is cut into pieces.
struct Plan {
  explicit Plan(const LinearParams& p) {
    width = panel_columns(p);
    all_panels = pieces(p.columns, width);
    depth = std::max(round_up(p.depth, kTileDepth), int64_t{kTileDepth});
    parts = pieces(depth, kPart);
    part = round_up(pieces(depth, parts), kTileDepth);
    parts = pieces(depth, part);
    const int64_t lines = depth / kLine;
    row = (lines % 2 == 0 ? lines + 1 : lines) * kLine;
    const int64_t fit = kChunkBytes / (row * static_cast<int64_t>(sizeof(bfloat16)));
    // Few rows are one chunk even where a part of K alone fits.
    const bool few = p.rows <= kFewRows;
    const int64_t most = few ? kFewRows : std::clamp(fit, kFewestRows, kMostRows);
    chunks = pieces(p.rows, most);
    chunk = round_up(pieces(p.rows, chunks), kTileRows);
    chunks = pieces(p.rows, chunk);
    packed = std::clamp<int64_t>(kLinearPackBytes / (panel() * 4), 1, all_panels);
    by_panels = copied_words() * 4 <= kLinearRowsBytes;
    // Enough pieces for the threads to share, whatever their number; fewer where every one of them
    // reads the rows from afar.
    const int64_t enough = by_panels && p.rows > fit ? 8 : 24;
    constexpr int64_t kPanels = 8;
    panels = std::clamp<int64_t>(kSumsBytes / (blocks() * kBlockSums * 4), 1, kPanels);
    const int64_t times = by_panels ? 1 : chunks;
    while (panels > 1 && pieces(by_panels ? all_panels : packed, panels) * times < enough) --panels;
  }
  int64_t panel() const { return depth / 2 * kBlockColumns; }  // words
  int64_t blocks() const { return pieces(chunk, kBlockRows); }
  int64_t copied_words() const { return chunks * chunk * row / 2; }
  int64_t width;       // columns of a panel
  int64_t all_panels;  // of the weights
  int64_t depth;       // K in whole tiles
  int64_t parts;       // of K
  int64_t part;        // elements of one, but for the last
  int64_t row;         // elements between copied rows of x, an odd number of lines
  int64_t chunk;       // rows
  int64_t chunks;
  bool by_panels;  // or by rows
  int64_t packed;  // panels at a time
  int64_t panels;  // of a piece
};

// The panel whose columns begin at `first`: [depth / 2 words][kColumns].
void pack_panel(const LinearParams& p, const Plan& plan, int64_t first, float* panel) {
  VUInt words[kLanes];
  for (int v = 0; v < kVecs; ++v) {
    const auto [begin, end] = rows_of_vector(p, first, v);
    const int64_t rows = std::clamp<int64_t>(end - begin, 0, kLanes);
    const bfloat16* weight = static_cast<const bfloat16*>(p.weight) + begin * p.weight_stride;
    for (int64_t k = 0; k < plan.depth; k += kTileDepth) {
      pack_tiles(weight + k, p.weight_stride, rows, 1, p.depth - k, words,
                 [&](int64_t) { return panel + k / 2 * kBlockColumns + v * kLanes; });
    }
  }
}

// The rows [begin, end) of x to rows of whole tiles; to tiles of rows with zeros.
void copy_rows(const LinearParams& p, const Plan& plan, int64_t begin, int64_t end, bfloat16* to) {
  const size_t present = static_cast<size_t>(p.depth) * sizeof(bfloat16);
  const size_t missing = static_cast<size_t>(plan.depth - p.depth) * sizeof(bfloat16);
  for (int64_t r = begin; r < end; ++r, to += plan.row) {
    if (present > 0) {
      std::memcpy(to, static_cast<const bfloat16*>(p.x) + r * p.x_stride, present);
    }
    std::memset(to + p.depth, 0, missing);
  }
  const int64_t rest = round_up(end - begin, kTileRows) - (end - begin);
  std::memset(to, 0, static_cast<size_t>(rest * plan.row) * sizeof(bfloat16));
}

// A block whose sums are complete.
struct Finished {
  int64_t row;
  int64_t rows = 0;
  int64_t column;
  const float* sums;
};

// Whole panels, epilogue by epilogue; what finish() of linear_parts.h does row by row.
template <LinearEpilogue kKind>
void finish_whole(const LinearParams& p, const Finished& block) {
  constexpr bool kGated = is_geglu(kKind);
  constexpr LinearEpilogue kGate =
      kKind == LinearEpilogue::kGEGLU ? LinearEpilogue::kGELU : LinearEpilogue::kGELUTanh;
  const bfloat16* bias = static_cast<const bfloat16*>(p.bias);
  Vec shift[kVecs] = {Vec(0.f), Vec(0.f)};
  if (bias != nullptr) {
    shift[0] = load(bias + block.column);
    shift[1] = load(bias + block.column + (kGated ? p.columns : kLanes));
  }
  const float* sums = block.sums;
  bfloat16* out = static_cast<bfloat16*>(p.out) + block.row * p.out_stride + block.column;
  for (int64_t r = 0; r < block.rows; ++r, sums += kColumns, out += p.out_stride) {
    Vec a = Vec(load(sums)) + shift[0];
    Vec b = Vec(load(sums + kLanes)) + shift[1];
    if constexpr (kGated) {
      store(out, a * activated<bfloat16>(kGate, b));
      continue;
    }
    if constexpr (kKind == LinearEpilogue::kGatedResidual) {
      Vec gate[kVecs] = {Vec(1.f), Vec(1.f)};
      if (p.gate != nullptr) {
        const bfloat16* from = static_cast<const bfloat16*>(p.gate) +
                               (block.row + r) / p.rows_per_sample * p.gate_stride + block.column;
        for (int v = 0; v < kVecs; ++v) gate[v] = load(from + v * kLanes);
      }
      a = fma(gate[0], a, load(out));
      b = fma(gate[1], b, load(out + kLanes));
    } else {
      a = activated<bfloat16>(kKind, a);
      b = activated<bfloat16>(kKind, b);
    }
    store(out, a);
    store(out + kLanes, b);
  }
}

void finish_block(const LinearParams& p, int64_t width, const Finished& block) {
  if (block.rows > 0 && block.column + width <= p.columns) {
    switch (p.epilogue) {
      case LinearEpilogue::kNone: return finish_whole<LinearEpilogue::kNone>(p, block);
      case LinearEpilogue::kGELU: return finish_whole<LinearEpilogue::kGELU>(p, block);
      case LinearEpilogue::kGELUTanh: return finish_whole<LinearEpilogue::kGELUTanh>(p, block);
      case LinearEpilogue::kGatedResidual:
        return finish_whole<LinearEpilogue::kGatedResidual>(p, block);
      case LinearEpilogue::kGEGLU: return finish_whole<LinearEpilogue::kGEGLU>(p, block);
      case LinearEpilogue::kGEGLUTanh: return finish_whole<LinearEpilogue::kGEGLUTanh>(p, block);
    }
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    VFloat one[kVecs];
    for (int v = 0; v < kVecs; ++v) one[v] = load(block.sums + r * kColumns + v * kLanes).v;
    finish<bfloat16>(p, block.row + r, block.column, one);
  }
}

// Panels that go together, packed, the first of column `column`.
struct Group {
  const float* panels;
  int64_t column;
  int64_t count;
};

// Brings what comes next nearer, step by step of the products of a group.
class Ahead {
 public:
  // The panels of the next group, packed; part after part as they are needed.
  Ahead(const Plan& plan, const float* panels, int64_t count)
      : lines_(count * plan.panel() / kLanes), row_(lines_), data_(panels) {}
  // The rows of the weights from which the next group will be packed.
  Ahead(const LinearParams& p, const Plan& plan, int64_t column, int64_t count)
      : row_(pieces(p.depth, kLine)), params_(&p), width_(plan.width), column_(column) {
    lines_ = count * kColumns * row_;
  }
  void step(int64_t index, int64_t of) const {
    const int64_t end = (index + 1) * lines_ / of;
    for (int64_t at = index * lines_ / of; at < end; ++at) __builtin_prefetch(line(at), 0, 2);
  }

 private:
  const void* line(int64_t at) const {
    if (params_ == nullptr) return data_ + at * kLanes;
    const LinearParams& p = *params_;
    const int64_t row = at / row_;
    const int64_t first = column_ + row / kColumns * width_;
    const auto [begin, end] = rows_of_vector(p, first, static_cast<int>(row % kColumns / kLanes));
    const int64_t own = std::clamp<int64_t>(begin + row % kLanes, 0, end - 1);
    return static_cast<const bfloat16*>(p.weight) + own * p.weight_stride + at % row_ * kLine;
  }
  int64_t lines_;
  int64_t row_;
  const float* data_ = nullptr;
  const LinearParams* params_ = nullptr;
  int64_t width_ = 0;
  int64_t column_ = 0;
};

// The rows [begin, end) of x, copied, with a group of panels. A block is finished while the tiles
// multiply the next one; this is one of `turns` with these panels. sums: [2] blocks that are done,
// then those that wait.
void compute(const LinearParams& p, const Plan& plan, const Group& group, const Ahead& ahead,
             int64_t turn, int64_t turns, int64_t begin, int64_t end, const bfloat16* x,
             Tiles& tiles, float* sums) {
  float* const done = sums;
  sums += 2 * kBlockSums;
  const int64_t blocks = pieces(end - begin, kBlockRows);
  constexpr int64_t kElement = sizeof(bfloat16);
  int64_t step = 0;
  Finished before;
  for (int64_t part = 0; part < plan.parts; ++part) {
    const int64_t from = part * plan.part;
    const int64_t steps = std::min(plan.part, plan.depth - from) / kTileDepth;
    const bool last = part + 1 == plan.parts;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * kBlockRows;
      const int64_t rows = std::min(kBlockRows, end - begin - row);
      const char* upper = reinterpret_cast<const char*>(x + row * plan.row + from);
      const char* lower = upper + kTileRows * plan.row * kElement;
      for (int64_t i = 0; i < group.count; ++i, ++step) {
        const int64_t all = plan.parts * blocks * group.count;
        ahead.step(turn * all + step, turns * all);
        const float* panel = group.panels + i * plan.panel() + from / 2 * kBlockColumns;
        float* const waiting = sums + (b * plan.panels + i) * kBlockSums;
        float* const target = last ? done + step % 2 * kBlockSums : waiting;
        if (rows > kTileRows) {
          begin_block<2>(tiles, part == 0, waiting);
          add_to_block<2>(tiles, upper, lower, plan.row * kElement, panel, steps);
          end_block<2>(tiles, target);
        } else {
          begin_block<1>(tiles, part == 0, waiting);
          add_to_block<1>(tiles, upper, upper, plan.row * kElement, panel, steps);
          end_block<1>(tiles, target);
        }
        if (!last) continue;
        finish_block(p, plan.width, before);
        before = {begin + row, rows, group.column + i * plan.width, target};
      }
    }
  }
  finish_block(p, plan.width, before);
}

// Memory of a thread: sums, and `words` more.
struct Scratch {
  Scratch(const Plan& plan, int64_t words) {
    const int64_t sums_size = (2 + plan.blocks() * plan.panels) * kBlockSums;
    lines = make_lines(sums_size + words);
    sums = lines[0].values;
    rest = sums + sums_size;
  }
  std::unique_ptr<Line[]> lines;
  float* sums;
  float* rest;
};

// All rows are copied first; a thread packs the panels that it needs, and fetches the weights of
// its next ones while it multiplies.
void multiply_by_panels(const LinearParams& p, const Plan& plan, int64_t grain) {
  const auto memory = make_lines(plan.copied_words());
  bfloat16* const x = reinterpret_cast<bfloat16*>(memory[0].values);
  constexpr int64_t kElements = 1 << 17;
  parallel_for(0, pieces(p.rows, kBlockRows), kElements / (kBlockRows * plan.depth) + 1,
               [&](int64_t begin, int64_t end) {
                 const int64_t row = begin * kBlockRows;
                 copy_rows(p, plan, row, std::min(end * kBlockRows, p.rows), x + row * plan.row);
               });
  const int64_t groups = pieces(plan.all_panels, plan.panels);
  SharedIndices::run(groups, grain, [&](const auto& next) {
    const Scratch scratch(plan, plan.panels * plan.panel());
    Tiles tiles;
    for (int64_t i = next(); i >= 0; i = next()) {
      const auto count_of = [&](int64_t index) {
        return std::clamp<int64_t>(plan.all_panels - index * plan.panels, 0, plan.panels);
      };
      const int64_t column = i * plan.panels * plan.width;
      const Group group{scratch.rest, column, count_of(i)};
      for (int64_t k = 0; k < group.count; ++k) {
        pack_panel(p, plan, column + k * plan.width, scratch.rest + k * plan.panel());
      }
      const Ahead ahead(p, plan, column + plan.panels * plan.width, count_of(i + 1));
      for (int64_t c = 0; c < plan.chunks; ++c) {
        const int64_t row = c * plan.chunk;
        compute(p, plan, group, ahead, c, plan.chunks, row, std::min(row + plan.chunk, p.rows),
                x + row * plan.row, tiles, scratch.sums);
      }
    }
  });
}

// The weights are packed first, plan.packed panels at a time; a thread copies a chunk of the rows.
void multiply_by_rows(const LinearParams& p, const Plan& plan, int64_t grain) {
  const auto memory = make_lines(plan.packed * plan.panel());
  float* const weights = memory[0].values;
  constexpr int64_t kElements = 1 << 16;
  for (int64_t from = 0; from < plan.all_panels; from += plan.packed) {
    const int64_t count = std::min(plan.packed, plan.all_panels - from);
    parallel_for(0, count, kElements / (plan.depth * kColumns) + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     pack_panel(p, plan, (from + i) * plan.width, weights + i * plan.panel());
                   }
                 });
    const int64_t groups = pieces(count, plan.panels);
    SharedIndices::run(groups * plan.chunks, grain, [&](const auto& next) {
      const Scratch scratch(plan, plan.chunk * plan.row / 2);
      bfloat16* const x = reinterpret_cast<bfloat16*>(scratch.rest);
      Tiles tiles;
      int64_t copied = -1;
      for (int64_t i = next(); i >= 0; i = next()) {
        const int64_t row = i / groups * plan.chunk;
        const int64_t row_end = std::min(row + plan.chunk, p.rows);
        if (copied != row) copy_rows(p, plan, row, row_end, x);
        copied = row;
        const int64_t first = i % groups * plan.panels;
        const auto count_of = [&](int64_t panel) {
          return std::clamp<int64_t>(count - panel, 0, plan.panels);
        };
        const Group group{weights + first * plan.panel(), (from + first) * plan.width,
                          count_of(first)};
        const int64_t coming = first + plan.panels;
        const Ahead ahead(plan, weights + coming * plan.panel(), count_of(coming));
        compute(p, plan, group, ahead, 0, 1, row, row_end, x, tiles, scratch.sums);
      }
    });
  }
}

}  // namespace

void linear_cpu(const LinearParams& p) {
  const Plan plan(p);
  // Small products stay on one thread.
  constexpr int64_t kOperations = 1 << 20;
  const int64_t each = std::min(p.rows, plan.chunk) * plan.panels * kColumns * plan.depth;
  const int64_t grain = kOperations / std::max<int64_t>(1, each);
  const auto multiply = plan.by_panels ? multiply_by_panels : multiply_by_rows;
  multiply(p, plan, grain);
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
