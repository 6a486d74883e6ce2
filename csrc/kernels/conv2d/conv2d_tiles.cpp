// conv2d on the tile registers of AMX; called for bfloat16 alone. A product without its matrix, as
// in conv2d_cpu.cpp: a tile of x is copied with its halo and zeros for the padding, and blocks of
// two times 16 output pixels by 32 output channels are summed over all taps.
//
// A left operand is 16 output pixels of 32 channels, a constant stride apart. They lie so in the
// copy where 16 of them fit a row of the tile; where they do not, the same pixel of several images
// lies together, and 16 fit into the rows of all of these. Elsewhere each column of the kernel has
// a copy of its own, without a halo at the sides (and each row too where rows are skipped), in
// which the pixels of a whole image follow each other.
//
// The weights are packed once for all tiles, as many output channels at a time as kConv2dPackBytes
// take; the threads share them. K is cut into parts as in linear_tiles.cpp; sums wait in memory
// between two parts. The parts depend on the weights' shape alone, and so does every result.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>

#include "accelrt/parallel.h"
#include "accelrt/tile_block.h"
#include "accelrt/tile_pack.h"
#include "kernels/conv2d/conv2d_parts.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

using namespace conv2d_parts;
using linear_parts::make_lines;
using linear_parts::round_up;

constexpr int64_t kPart = 384;                // along K, at most: 24 KiB of a panel
constexpr int64_t kPixels = 22 * kBlockRows;  // of a tile, at most
constexpr int64_t kPanels = 4;                // that share the pixels that were just read
constexpr int64_t kLine = 32;                 // bfloat16 in a line of the cache

// How the output is cut into tiles, and the copy of the input that belongs to one:
// [row copies][column copies][images / together][in_rows][in_columns][together][pixel].
struct Tiling {
  int64_t images, rows, columns;      // of the output, in a tile
  int64_t together;                   // images
  int64_t row_copies, column_copies;  // 1, or one per row or column of the kernel
  int64_t step_y, step_x;             // pixels of x from one of a copy to the next
  int64_t in_rows, in_columns;
  int64_t pixel;     // elements between pixels
  int64_t next;      // between the output pixels of a run
  int64_t next_row;  // between output rows
  int64_t tap_row;   // between rows and columns of the kernel
  int64_t tap_column;
  bool follows;  // the rows of an image follow each other without a gap
  int64_t line() const { return in_columns * together * pixel; }
  int64_t image_group() const { return in_rows * line(); }
  int64_t copy() const { return images / together * image_group(); }
  // The last block reads on to a whole tile.
  int64_t elements() const {
    return row_copies * column_copies * copy() + kTileRows * std::max(pixel, next);
  }
  int64_t bytes() const { return elements() * static_cast<int64_t>(sizeof(bfloat16)); }
};

Tiling tiling_with(const Conv2dParams& p, int64_t images, int64_t rows, int64_t columns) {
  Tiling t;
  t.rows = even(p.out_height, rows);
  t.columns = even(p.out_width, columns);
  t.together = kTileRows / std::gcd<int64_t>(t.columns, kTileRows);
  if (t.together > std::min(images, p.images) || p.stride_width > 1) t.together = 1;
  t.images = round_up(even(p.images, images), t.together);
  const int64_t lines = pieces(p.channels, kLine);
  t.pixel = (lines % 2 == 0 ? lines + 1 : lines) * kLine;  // neighbours in different sets
  const bool fits = t.columns * t.together % kTileRows == 0;
  const bool skips = !fits && p.stride_height > 1;
  t.column_copies = fits ? 1 : p.kernel_width;
  t.row_copies = skips ? p.kernel_height : 1;
  t.step_x = fits ? 1 : p.stride_width;
  t.step_y = skips ? p.stride_height : 1;
  t.in_columns = fits ? (t.columns - 1) * p.stride_width + p.kernel_width : t.columns;
  t.in_rows = skips ? t.rows : (t.rows - 1) * p.stride_height + p.kernel_height;
  t.next = (fits ? p.stride_width : 1) * t.pixel;
  t.next_row = (skips ? 1 : p.stride_height) * t.line();
  t.tap_column = fits ? t.together * t.pixel : t.copy();
  t.tap_row = skips ? t.column_copies * t.copy() : t.line();
  t.follows = t.next_row == t.columns * t.together * t.next;
  return t;
}

Tiling tiling_of(const Conv2dParams& p) {
  int64_t rows, columns;
  if (p.kernel_width == 1 && p.kernel_height > 1) {  // a halo of rows alone: few columns
    rows = std::min<int64_t>(p.out_height, kBlockRows);
    columns = std::min(p.out_width, std::max<int64_t>(kPixels / rows, 1));
    if (columns < p.out_width && columns > kTileRows) columns -= columns % kTileRows;
  } else {
    columns = std::min(p.out_width, kMaxColumns);
    rows = std::min(p.out_height, std::max<int64_t>(kPixels / columns, 1));
  }
  int64_t images = std::max<int64_t>(1, kPixels / (rows * columns));
  const int64_t together = kTileRows / std::gcd<int64_t>(even(p.out_width, columns), kTileRows);
  if (images < together) {  // fewer rows of more images
    images = std::min(together, p.images);
    rows = std::max<int64_t>(kPixels / (images * columns), 1);
  }
  Tiling t = tiling_with(p, images, rows, columns);
  while (t.bytes() > 2 * kConv2dTileBytes && t.images * t.rows * t.columns > 1) {
    if (t.images > t.together) {
      images = t.images / 2;
    } else if (t.rows > 1 && (t.rows > 4 || t.columns <= kTileRows)) {
      rows = t.rows / 2;
    } else if (t.images > 1) {
      images = t.images / 2;
    } else {
      columns = t.columns / 2;
    }
    t = tiling_with(p, images, rows, columns);
  }
  return t;
}

// K in parts: some taps of all channels, or one tap of some channels.
struct Depth {
  explicit Depth(const Conv2dParams& p) {
    taps = p.kernel_height * p.kernel_width;
    channels = std::max(round_up(p.channels, kTileDepth), int64_t{kTileDepth});
    ranges = pieces(channels, kPart);
    range = round_up(even(channels, kPart), kTileDepth);
    ranges = pieces(channels, range);
    group = ranges > 1 ? 1 : std::min(taps, kPart / channels);
    tap_parts = pieces(taps, group);
    parts = ranges * tap_parts;
  }
  int64_t panel() const { return taps * channels / 2 * kBlockColumns; }  // words
  int64_t taps;
  int64_t channels;  // in whole tiles
  int64_t ranges;    // of channels
  int64_t range;     // channels of one, but for the last
  int64_t group;     // taps of a part
  int64_t tap_parts;
  int64_t parts;
};

// A part: the taps [tap, tap_end) of the channels [from, from + count), the last in whole tiles.
struct Part {
  int64_t tap, tap_end, from, count;
  int64_t offset;  // in a panel, in words
  int64_t words() const { return (tap_end - tap) * count / 2 * kBlockColumns; }
};

Part part_at(const Depth& d, int64_t index) {
  Part part;
  const int64_t range = index / d.tap_parts;
  part.from = range * d.range;
  part.count = std::min(d.range, d.channels - part.from);
  part.tap = index % d.tap_parts * d.group;
  part.tap_end = std::min(part.tap + d.group, d.taps);
  part.offset = (part.from * d.taps + part.tap * part.count) / 2 * kBlockColumns;
  return part;
}

// One pixel and zeros up to whole tiles.
void copy_pixel(const bfloat16* from, int64_t channels, int64_t padded, bfloat16* to) {
  int64_t c = 0;
  for (; c + kLine <= channels; c += kLine) std::memcpy(to + c, from + c, kTileBytes);
  if (c < channels) {
    const size_t left = static_cast<size_t>(channels - c) * sizeof(bfloat16);
    std::memcpy(to + c, from + c, left);
    std::memset(reinterpret_cast<char*>(to + c) + left, 0, kTileBytes - left);
    c += kLine;
  }
  if (c < padded) std::memset(to + c, 0, static_cast<size_t>(padded - c) * sizeof(bfloat16));
}

// The input of a tile to `target`.
void gather(const Conv2dParams& p, const Tiling& t, const Depth& d, const Patch& patch,
            bfloat16* target) {
  for (int64_t copy = 0; copy < t.row_copies * t.column_copies; ++copy, target += t.copy()) {
    const int64_t first_row = patch.row * p.stride_height - p.padding_top + copy / t.column_copies;
    const int64_t first_column =
        patch.column * p.stride_width - p.padding_left + copy % t.column_copies;
    for (int64_t i = 0; i < patch.images; ++i) {
      const bfloat16* image = static_cast<const bfloat16*>(p.x) + (patch.image + i) * p.x_stride[0];
      bfloat16* to = target + i / t.together * t.image_group() + i % t.together * t.pixel;
      for (int64_t r = 0; r < t.in_rows; ++r, to += t.line()) {
        const int64_t row = first_row + r * t.step_y;
        const bool inside = row >= 0 && row < p.height;
        for (int64_t c = 0; c < t.in_columns; ++c) {
          const int64_t column = first_column + c * t.step_x;
          const bool present = inside && column >= 0 && column < p.width;
          copy_pixel(present ? image + row * p.x_stride[1] + column * p.x_stride[2] : nullptr,
                     present ? p.channels : 0, d.channels, to + c * t.together * t.pixel);
        }
      }
    }
  }
}

// Panel of the output channels from `first`, zeros past the last and past the channels.
void pack(const Conv2dParams& p, const Depth& d, int64_t first, VUInt* words, float* panel) {
  const int64_t row = p.channels * d.taps;
  for (int half = 0; half < 2; ++half) {
    const int64_t begin = first + half * kLanes;
    const int64_t rows = std::clamp<int64_t>(p.out_channels - begin, 0, kLanes);
    const bfloat16* weight = static_cast<const bfloat16*>(p.weight) + begin * row;
    for (int64_t from = 0; from < d.channels; from += d.range) {
      const int64_t count = std::min(d.range, d.channels - from);
      for (int64_t c = from; c < from + count; c += kTileDepth) {
        const auto to = [&](int64_t tap) {
          const int64_t before = from * d.taps + tap * count + c - from;
          return panel + before / 2 * kBlockColumns + half * kLanes;
        };
        const int64_t left = p.channels - c;
        if (!p.weight_channels_last) {
          pack_tiles(weight + c * d.taps, row, rows, d.taps, left, words, to);
          continue;
        }
        for (int64_t tap = 0; tap < d.taps; ++tap) {
          pack_tiles(weight + tap * p.channels + c, row, rows, 1, left, words,
                     [&](int64_t) { return to(tap); });
        }
      }
    }
  }
}

// Up to 16 output pixels whose inputs are a constant stride apart.
struct Run {
  int64_t image, row;  // of the tile, from which on `at` counts pixels
  int64_t at;          // of the first one
  int64_t count;
  int64_t offset;  // of its input in the copy, in elements
};

// The runs of a tile, one after the other.
class Runs {
 public:
  Runs(const Tiling& t, const Patch& patch) : t_(t), patch_(patch) {
    rows_ = t.follows && patch.columns == t.columns ? patch.rows : 1;
    length_ = rows_ * patch.columns * t.together;
  }
  bool next(Run& run) {
    if (image_ >= patch_.images) return false;
    run.image = image_;
    run.row = row_;
    run.at = at_;
    run.count = std::min<int64_t>(kTileRows, length_ - at_);
    run.offset = image_ / t_.together * t_.image_group() + row_ * t_.next_row + at_ * t_.next;
    at_ += kTileRows;
    if (at_ >= length_) {
      at_ = 0;
      row_ += rows_;
      if (row_ == patch_.rows) {
        row_ = 0;
        image_ += t_.together;
      }
    }
    return true;
  }
  // Of the largest tile; one that is cut off at the right has its runs row by row.
  static int64_t blocks(const Tiling& t) {
    return pieces(t.images / t.together * t.rows * pieces(t.columns * t.together, kTileRows), 2);
  }

 private:
  const Tiling& t_;
  const Patch& patch_;
  int64_t rows_;    // of the image that follow each other without a gap
  int64_t length_;  // in pixels
  int64_t image_ = 0, row_ = 0, at_ = 0;
};

template <int kRowTiles>
void multiply(Tiles& tiles, const Conv2dParams& p, const Tiling& t, const Part& part,
              const bfloat16* upper, const bfloat16* lower, const float* panel, bool first,
              const float* waiting, float* target) {
  begin_block<kRowTiles>(tiles, first, waiting);
  const int64_t stride = t.next * static_cast<int64_t>(sizeof(bfloat16));
  const int64_t steps = part.count / kTileDepth;
  for (int64_t tap = part.tap; tap < part.tap_end; ++tap) {
    const int64_t at =
        tap / p.kernel_width * t.tap_row + tap % p.kernel_width * t.tap_column + part.from;
    add_to_block<kRowTiles>(tiles, reinterpret_cast<const char*>(upper + at),
                            reinterpret_cast<const char*>(lower + at), stride, panel, steps);
    panel += part.count / 2 * kBlockColumns;
  }
  end_block<kRowTiles>(tiles, target);
}

// The sums of a run and the panel of the output channels from `first`, rounded.
void finish(const Conv2dParams& p, const Tiling& t, const Patch& patch, const Run& run,
            int64_t first, const float* sums) {
  const int lanes[2] = {
      static_cast<int>(std::min<int64_t>(kLanes, p.out_channels - first)),
      static_cast<int>(std::clamp<int64_t>(p.out_channels - first - kLanes, 0, kLanes))};
  const bfloat16* bias = static_cast<const bfloat16*>(p.bias);
  Vec shift[2] = {Vec(0.f), Vec(0.f)};
  if (bias != nullptr) {
    for (int v = 0; v < 2; ++v) shift[v] = load_any(bias + first + v * kLanes, lanes[v]);
  }
  const int64_t width = patch.columns * t.together;
  int64_t row = run.row + run.at / width;
  int64_t column = run.at % width / t.together;
  int64_t image = run.at % t.together;
  const int64_t present = std::min(t.together, patch.images - run.image);
  bfloat16* const out = static_cast<bfloat16*>(p.out) + first +
                        (patch.image + run.image) * p.out_stride[0] + patch.row * p.out_stride[1] +
                        patch.column * p.out_stride[2];
  const bool whole = lanes[1] == kLanes;
  for (int64_t i = 0; i < run.count; ++i, sums += kBlockColumns) {
    if (image < present) {
      bfloat16* to =
          out + image * p.out_stride[0] + row * p.out_stride[1] + column * p.out_stride[2];
      const Vec a = Vec(load(sums)) + shift[0];
      const Vec b = Vec(load(sums + kLanes)) + shift[1];
      if (whole) {
        store(to, a);
        store(to + kLanes, b);
      } else {
        store_n(to, lanes[0], a);
        store_n(to + kLanes, lanes[1], b);
      }
    }
    if (++image < t.together) continue;
    image = 0;
    if (++column < patch.columns) continue;
    column = 0;
    ++row;
  }
}

// A block whose sums are complete.
struct Finished {
  Run upper;
  Run lower;
  bool two;
  int64_t first;  // output channel
  const float* sums = nullptr;
};

void finish_block(const Conv2dParams& p, const Tiling& t, const Patch& patch,
                  const Finished& block) {
  if (block.sums == nullptr) return;
  finish(p, t, patch, block.upper, block.first, block.sums);
  if (!block.two) return;
  finish(p, t, patch, block.lower, block.first, block.sums + kTileRows * kBlockColumns);
}

}  // namespace

void conv2d_cpu(const Conv2dParams& given) {
  const Conv2dParams p = with_long_rows(given);
  const Tiling t = tiling_of(p);
  const Depth d(p);
  const int64_t tiles = patches(p, t);
  const int64_t all_panels = pieces(p.out_channels, kBlockColumns);
  const int64_t panel_bytes = d.panel() * static_cast<int64_t>(sizeof(float));
  const int64_t packed = std::clamp<int64_t>(kConv2dPackBytes / panel_bytes, 1, all_panels);
  // Enough pieces for the threads to share, whatever their number.
  constexpr int64_t kEnough = 64;
  int64_t panels = std::min(kPanels, packed);
  while (panels > 1 && tiles * pieces(packed, panels) < kEnough) panels /= 2;
  const int64_t blocks = Runs::blocks(t);
  // Two blocks that are done, then those that wait.
  const int64_t sums_size = (2 + blocks * panels) * kBlockSums;
  const auto pack_memory = make_lines(packed * d.panel());
  float* const weights = pack_memory[0].values;
  for (int64_t from = 0; from < all_panels; from += packed) {
    const int64_t count = std::min(packed, all_panels - from);
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<VUInt[]> words(new VUInt[static_cast<size_t>(d.taps * kLanes)]);
      for (int64_t i = begin; i < end; ++i) {
        pack(p, d, (from + i) * kBlockColumns, words.get(), weights + i * d.panel());
      }
    });
    const int64_t groups = pieces(count, panels);
    SharedIndices::run(tiles * groups, 1, [&](const auto& next) {
      const auto memory = make_lines(sums_size + pieces(t.bytes(), sizeof(float)));
      float* const sums = memory[0].values;
      bfloat16* const x = reinterpret_cast<bfloat16*>(sums + sums_size);
      Tiles registers;
      int64_t gathered = -1;
      Patch patch{};
      for (int64_t i = next(); i >= 0; i = next()) {
        if (gathered != i / groups) {
          gathered = i / groups;
          patch = patch_at(p, t, gathered);
          gather(p, t, d, patch, x);
        }
        const int64_t group = i % groups * panels;
        const int64_t here = std::min(panels, count - group);
        Finished before;
        for (int64_t index = 0; index < d.parts; ++index) {
          const Part part = part_at(d, index);
          Runs runs(t, patch);
          Run upper;
          Run lower;
          const bool last = index + 1 == d.parts;
          const Part coming = part_at(d, last ? 0 : index + 1);
          const int64_t lines = coming.words() / kLanes;
          for (int64_t b = 0; runs.next(upper); ++b) {
            const bool two = runs.next(lower);
            const auto run = two ? multiply<2> : multiply<1>;
            for (int64_t k = 0; k < here; ++k) {
              const int64_t ahead = group + k + (last ? panels : 0);
              if (ahead < count) {
                prefetch_lines(weights + ahead * d.panel() + coming.offset, b * lines / blocks,
                               (b + 1) * lines / blocks);
              }
              float* const waiting = sums + (2 + b * panels + k) * kBlockSums;
              float* const target = last ? sums + (b * here + k) % 2 * kBlockSums : waiting;
              const float* const panel = weights + (group + k) * d.panel() + part.offset;
              run(registers, p, t, part, x + upper.offset, x + (two ? lower : upper).offset, panel,
                  index == 0, waiting, target);
              if (!last) continue;
              // A block is finished while the tiles multiply the next one.
              finish_block(p, t, patch, before);
              before = {upper, lower, two, (from + group + k) * kBlockColumns, target};
            }
          }
        }
        finish_block(p, t, patch, before);
      }
    });
  }
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
