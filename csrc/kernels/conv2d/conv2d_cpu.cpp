// A product without its matrix: a tile of x is widened to float32 with its halo and zeros for the
// padding, [images][rows][columns][channels], so that output pixels beside each other are rows of
// a matrix, `stride` pixels apart, and each tap of the kernel is an offset. Blocks of kRows output
// pixels by one panel of the weights (linear_parts.h) are summed in registers, over all taps.
//
// A panel holds all taps of as many channels as the second-level cache takes; where that is not
// all of them, the sums of a tile wait in memory between panels. Panels are made anew for every
// tile, which costs as much as a dozen of its pixels, so no copy of the weights is kept.
#include <algorithm>
#include <cstring>

#include "accelrt/dispatch.h"
#include "accelrt/parallel.h"
#include "accelrt/unrolled.h"
#include "kernels/conv2d/conv2d.h"
#include "kernels/linear/linear_parts.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

using linear_parts::kColumns;
using linear_parts::kVecs;
using linear_parts::make_lines;
using linear_parts::multiply_add;
using linear_parts::round_up;

#if defined(__AVX512F__)
constexpr int kRows = 12;  // with two vectors 24 sums, of 32 registers
#else
constexpr int kRows = 6;  // 12 sums, of 16 registers
#endif
constexpr int kFew = kRows / 3;
constexpr int kMore = 2 * kRows / 3;

// Output pixels of a tile, at most: many, to make up for its panels.
constexpr int64_t kPixels = 128 * kRows;
// Output columns of a tile, where the kernel has columns: more make the halo no smaller.
constexpr int64_t kMaxColumns = 256;
// Rows of a panel: a fourth of a mebibyte.
constexpr int64_t kMaxDepth = (int64_t{1} << 18) / (kColumns * 4);
// Pixels this far apart (half a way of the first-level cache) crowd each other out.
constexpr int64_t kCrowded = 512;

int64_t pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }

// The size of the pieces of `total` that are as equal as can be and at most `size`.
int64_t even(int64_t total, int64_t size) { return pieces(total, pieces(total, size)); }

// How the output is cut into tiles, and the widened input that belongs to one.
struct Tiling {
  int64_t images, rows, columns;  // of the output, in a tile
  int64_t in_rows, in_columns;
  int64_t pixel;  // floats between pixels
  int64_t floats() const { return images * in_rows * in_columns * pixel; }
};

Tiling tiling_with(const Conv2dParams& p, int64_t images, int64_t rows, int64_t columns) {
  Tiling t;
  t.images = even(p.images, images);
  t.rows = even(p.out_height, rows);
  t.columns = even(p.out_width, columns);
  t.in_rows = (t.rows - 1) * p.stride_height + p.kernel_height;
  t.in_columns = (t.columns - 1) * p.stride_width + p.kernel_width;
  t.pixel = p.channels + (p.channels % kCrowded == 0 ? kLanes : 0);
  return t;
}

Tiling tiling_of(const Conv2dParams& p) {
  int64_t rows, columns;
  if (p.kernel_width == 1 && p.kernel_height > 1) {  // a halo of rows alone: few columns
    rows = std::min<int64_t>(p.out_height, kPixels / kRows);
    columns = std::min(p.out_width, std::max<int64_t>(kPixels / rows, 1));
  } else {
    columns = std::min(p.out_width, kMaxColumns);
    rows = std::min(p.out_height, std::max<int64_t>(kPixels / columns, 1));
  }
  const bool whole = rows == p.out_height && columns == p.out_width;
  int64_t images = whole ? std::max<int64_t>(1, kPixels / (rows * columns)) : 1;
  Tiling t = tiling_with(p, images, rows, columns);
  while (t.floats() * 4 > kConv2dTileBytes && t.images * t.rows * t.columns > 1) {
    if (t.images > 1) {
      images = t.images / 2;
    } else if (t.rows > 1 && (t.rows > 4 || t.columns <= kRows)) {
      rows = t.rows / 2;
    } else {
      columns = t.columns / 2;
    }
    t = tiling_with(p, images, rows, columns);
  }
  return t;
}

// Where a tile begins in the output, and what it has of it.
struct Tile {
  int64_t image, row, column;
  int64_t images, rows, columns;
};

Tile tile_at(const Conv2dParams& p, const Tiling& t, int64_t index) {
  const int64_t across = pieces(p.out_width, t.columns);
  const int64_t down = pieces(p.out_height, t.rows);
  Tile tile;
  tile.column = index % across * t.columns;
  tile.row = index / across % down * t.rows;
  tile.image = index / across / down * t.images;
  tile.images = std::min(t.images, p.images - tile.image);
  tile.rows = std::min(t.rows, p.out_height - tile.row);
  tile.columns = std::min(t.columns, p.out_width - tile.column);
  return tile;
}

template <typename T>
void widen(const T* from, int64_t n, float* to) {
  for_lanes(n, [&](int64_t i, int lanes) { store_any(to + i, lanes, load_any(from + i, lanes)); });
}

// The input of a tile to `target`.
template <typename T>
void gather(const Conv2dParams& p, const Tiling& t, const Tile& tile, float* target) {
  const T* x = static_cast<const T*>(p.x);
  const int64_t row_floats = t.in_columns * t.pixel;
  const int64_t first_row = tile.row * p.stride_height - p.padding_top;
  const int64_t first_column = tile.column * p.stride_width - p.padding_left;
  // The columns [begin, end) of the tile lie in the image.
  const int64_t begin = std::clamp<int64_t>(-first_column, 0, t.in_columns);
  const int64_t end = std::clamp<int64_t>(p.width - first_column, begin, t.in_columns);
  const bool dense = p.x_stride[2] == p.channels && t.pixel == p.channels;
  for (int64_t i = 0; i < tile.images; ++i) {
    for (int64_t r = 0; r < t.in_rows; ++r) {
      float* to = target + (i * t.in_rows + r) * row_floats;
      const int64_t row = first_row + r;
      if (row < 0 || row >= p.height || begin == end) {
        std::memset(to, 0, sizeof(float) * static_cast<size_t>(row_floats));
        continue;
      }
      std::memset(to, 0, sizeof(float) * static_cast<size_t>(begin * t.pixel));
      std::memset(to + end * t.pixel, 0,
                  sizeof(float) * static_cast<size_t>((t.in_columns - end) * t.pixel));
      const T* from = x + (tile.image + i) * p.x_stride[0] + row * p.x_stride[1] +
                      (first_column + begin) * p.x_stride[2];
      if (dense) {
        widen(from, (end - begin) * p.channels, to + begin * t.pixel);
        continue;
      }
      for (int64_t c = begin; c < end; ++c, from += p.x_stride[2]) {
        widen(from, p.channels, to + c * t.pixel);
      }
    }
  }
}

// The channels [from, to) of the rows of the weights that make the output channels from `first`,
// to panel: [taps][to - from][kColumns], zeros past the last output channel.
template <typename T>
void pack(const Conv2dParams& p, int64_t first, int64_t from, int64_t to, float* panel) {
  const int64_t taps = p.kernel_height * p.kernel_width;
  const int64_t depth = to - from;
  const int64_t row = p.channels * taps;
  // Elements that lie beside each other, `runs` times: all taps of a channel, or all channels of
  // a tap.
  const bool last = p.weight_channels_last;
  const int64_t runs = last ? taps : 1;
  const int64_t length = last ? depth : depth * taps;
  for (int v = 0; v < kVecs; ++v) {
    const int64_t begin = first + v * kLanes;
    const int64_t rows = std::clamp<int64_t>(p.out_channels - begin, 0, kLanes);
    float* column = panel + v * kLanes;
    for (int64_t run = 0; run < runs; ++run) {
      const T* corner = static_cast<const T*>(p.weight) + begin * row +
                        (last ? run * p.channels + from : from * taps);
      int64_t tap = run;
      int64_t channel = 0;
      for (int64_t u = 0; u < length; u += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, length - u));
        VFloat block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          block[i] = i < rows ? load_any(corner + i * row + u, lanes).v : VFloat{};
        }
        transpose(block);
        for (int i = 0; i < lanes; ++i) {
          store(column + (tap * depth + channel) * kColumns, block[i]);
          if (last || ++tap == taps) {
            if (!last) tap = 0;
            ++channel;
          }
        }
      }
    }
  }
}

// A panel and how to walk along the taps with it.
struct Panel {
  const float* weights;
  int64_t depth;  // channels
  int64_t kernel_height, kernel_width;
  int64_t next_row;  // floats between the rows and columns of the tile
  int64_t next_column;
};

// The sums of kCount output pixels, `stride` floats apart, from x on.
// Not inlined: among the code around it g++ may spill one of the sums in every turn.
template <int kCount>
__attribute__((noinline)) void multiply(const float* x, int64_t stride, const Panel& panel,
                                        VFloat* result) {
  constexpr int kBases = (kCount + 2) / 3;
  VFloat sums[kCount * kVecs];
  unrolled<kCount * kVecs>([&](auto i) { sums[i] = VFloat{}; });
  const float* weights = panel.weights;
  for (int64_t dy = 0; dy < panel.kernel_height; ++dy) {
    for (int64_t dx = 0; dx < panel.kernel_width; ++dx) {
      const float* corner = x + dy * panel.next_row + dx * panel.next_column;
      const float* base[kBases];
      unrolled<kBases>([&](auto b) { base[b] = corner + 3 * b * stride; });
#pragma GCC unroll 1
      for (int64_t u = 0; u < panel.depth; ++u) {
        VFloat w[kVecs];
        unrolled<kVecs>([&](auto v) { w[v] = load(weights + v * kLanes).v; });
        weights += kColumns;
        unrolled<kCount>([&](auto r) {
          unrolled<kVecs>([&](auto v) {
            VFloat& sum = sums[r * kVecs + v];
            sum = multiply_add<float>(base[r / 3] + r % 3 * stride, w[v], sum);
          });
        });
        unrolled<kBases>([&](auto b) { base[b] += 1; });
      }
    }
  }
  unrolled<kCount * kVecs>([&](auto i) { result[i] = sums[i]; });
}

// Output pixels of the next block, of those that are left in a row, and the size of the block.
// Two of kMore are faster than one of kRows and a small one.
struct Block {
  int count;
  int taken;
};

Block next_block(int64_t left) {
  if (left > 2 * kMore || left == kRows) return {kRows, kRows};
  if (left > kRows) return {kMore, kMore};
  const int count = static_cast<int>(left);
  return {count, count <= kFew ? kFew : count <= kMore ? kMore : kRows};
}

template <typename T>
void finish(const Conv2dParams& p, T* out, int64_t first, const VFloat* sums) {
  const T* bias = static_cast<const T*>(p.bias);
  for (int v = 0; v < kVecs; ++v) {
    const int64_t at = first + v * kLanes;
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, p.out_channels - at));
    if (lanes <= 0) return;
    Vec y = sums[v];
    if (bias != nullptr) y += load_any(bias + at, lanes);
    store_any(out + at, lanes, y);
  }
}

// A tile by the channels [from, to) of the panel of the output channels from `first`; `waiting`
// has its sums, [pixels][kColumns], unless these are all the channels.
template <typename T>
void multiply_tile(const Conv2dParams& p, const Tiling& t, const Tile& tile, const float* x,
                   const Panel& panel, int64_t first, int64_t from, int64_t to, float* waiting) {
  const int64_t stride = p.stride_width * t.pixel;
  for (int64_t i = 0; i < tile.images; ++i) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const float* row = x + from + (i * t.in_rows + r * p.stride_height) * panel.next_row;
      T* out = static_cast<T*>(p.out) + (tile.image + i) * p.out_stride[0] +
               (tile.row + r) * p.out_stride[1] + tile.column * p.out_stride[2];
      float* wait = waiting + (i * tile.rows + r) * tile.columns * kColumns;
      for (int64_t c = 0; c < tile.columns;) {
        const auto [count, taken] = next_block(tile.columns - c);
        VFloat sums[kRows * kVecs];
        if (taken == kFew) {
          multiply<kFew>(row + c * stride, stride, panel, sums);
        } else if (taken == kMore) {
          multiply<kMore>(row + c * stride, stride, panel, sums);
        } else {
          multiply<kRows>(row + c * stride, stride, panel, sums);
        }
        if (from > 0) {
          for (int k = 0; k < count * kVecs; ++k) {
            const Vec before = load(wait + c * kColumns + k * kLanes);
            sums[k] = (before + Vec(sums[k])).v;
          }
        }
        if (to < p.channels) {
          for (int k = 0; k < count * kVecs; ++k) store(wait + c * kColumns + k * kLanes, sums[k]);
        } else {
          for (int k = 0; k < count; ++k) {
            finish<T>(p, out + (c + k) * p.out_stride[2], first, sums + k * kVecs);
          }
        }
        c += count;
      }
    }
  }
}

// A kernel of one pixel sees no rows: those that lie densely are one.
Conv2dParams with_long_rows(Conv2dParams p) {
  const bool pixels = p.kernel_height == 1 && p.kernel_width == 1 && p.stride_height == 1 &&
                      p.stride_width == 1 && p.padding_top == 0 && p.padding_left == 0;
  if (!pixels) return p;
  if (p.x_stride[1] == p.width * p.x_stride[2] && p.out_stride[1] == p.width * p.out_stride[2]) {
    p.width = p.out_width = p.width * p.height;
    p.height = p.out_height = 1;
  }
  return p;
}

template <typename T>
void run(const Conv2dParams& given) {
  const Conv2dParams p = with_long_rows(given);
  const Tiling t = tiling_of(p);
  const int64_t taps = p.kernel_height * p.kernel_width;
  const int64_t tiles =
      pieces(p.images, t.images) * pieces(p.out_height, t.rows) * pieces(p.out_width, t.columns);
  const int64_t panels = pieces(p.out_channels, kColumns);
  const int64_t depth = std::min(p.channels, std::max<int64_t>(kMaxDepth / taps, 1));
  const int64_t step = p.channels == 0 ? 1 : even(p.channels, depth);
  // A block at the end of the last row reads up to kRows pixels past it.
  const int64_t tile_floats = round_up(t.floats() + kRows * p.stride_width * t.pixel, kLanes);
  const int64_t panel_floats = step * taps * kColumns;
  const int64_t wait_floats = t.images * t.rows * t.columns * kColumns;
  // Small convolutions stay on one thread.
  constexpr int64_t kOperations = 1 << 18;
  const int64_t each =
      t.images * t.rows * t.columns * kColumns * taps * std::max<int64_t>(1, p.channels);
  parallel_for(
      0, tiles * panels, std::max<int64_t>(1, kOperations / each), [&](int64_t begin, int64_t end) {
        const auto memory = make_lines(panel_floats + wait_floats + tile_floats);
        float* weights = memory[0].values;
        float* waiting = weights + panel_floats;
        float* x = waiting + wait_floats;
        std::memset(x + t.floats(), 0, sizeof(float) * (tile_floats - t.floats()));
        int64_t gathered = -1;
        Tile tile{};
        for (int64_t i = begin; i < end; ++i) {
          if (gathered != i / panels) {
            gathered = i / panels;
            tile = tile_at(p, t, gathered);
            gather<T>(p, t, tile, x);
          }
          const int64_t first = i % panels * kColumns;
          for (int64_t from = 0; from == 0 || from < p.channels; from += step) {
            const int64_t to = std::min(from + step, p.channels);
            pack<T>(p, first, from, to, weights);
            const Panel panel{
                weights, to - from, p.kernel_height, p.kernel_width, t.in_columns * t.pixel,
                t.pixel};
            multiply_tile<T>(p, t, tile, x, panel, first, from, to, waiting);
          }
        }
      });
}

}  // namespace

void conv2d_cpu(const Conv2dParams& p) {
  dispatch_dtype("conv2d", p.dtype, [&](auto tag) { run<typename decltype(tag)::type>(p); });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
