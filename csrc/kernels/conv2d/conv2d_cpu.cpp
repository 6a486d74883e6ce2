// A product without its matrix: a tile of x is copied with its halo and zeros for the padding,
// [images][rows][columns][channels], so that output pixels beside each other are rows of a matrix,
// `stride` pixels apart, and each tap of the kernel is an offset. Blocks of kRows output pixels by
// one panel of the weights (linear_parts.h) are summed in registers, over all taps. Channels are
// counted in the units of linear_parts.h: pairs of bfloat16 where the processor multiplies those,
// else floats, to which other dtypes are widened.
//
// A panel holds all taps of as many channels as the second-level cache takes; where that is not
// all of them, the sums of a tile wait in memory between panels. Panels are made anew for every
// tile, which costs as much as a dozen of its pixels, so no copy of the weights is kept.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "accelrt/dispatch.h"
#include "accelrt/parallel.h"
#include "accelrt/unrolled.h"
#include "kernels/conv2d/conv2d_parts.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

using namespace conv2d_parts;
using linear_parts::kColumns;
using linear_parts::kPairs;
using linear_parts::kUnit;
using linear_parts::kVecs;
using linear_parts::load_units;
using linear_parts::make_lines;
using linear_parts::multiply_add;
using linear_parts::round_up;
using linear_parts::units_of;

#if defined(__AVX512F__)
constexpr int kRows = 12;  // with two vectors 24 sums, of 32 registers
#else
constexpr int kRows = 6;  // 12 sums, of 16 registers
#endif
constexpr int kFew = kRows / 3;
constexpr int kMore = 2 * kRows / 3;

// Output pixels of a tile, at most: many, to make up for its panels.
constexpr int64_t kPixels = 768;
// Rows of a panel: a fourth of a mebibyte.
constexpr int64_t kMaxDepth = (int64_t{1} << 18) / (kColumns * 4);
// Pixels this far apart (half a way of the first-level cache) crowd each other out.
constexpr int64_t kCrowded = 512;

// How the output is cut into tiles, and the widened input that belongs to one.
struct Tiling {
  int64_t images, rows, columns;  // of the output, in a tile
  int64_t in_rows, in_columns;
  int64_t pixel;  // units between pixels
  int64_t units() const { return images * in_rows * in_columns * pixel; }
};

Tiling tiling_with(const Conv2dParams& p, int64_t units, int64_t images, int64_t rows,
                   int64_t columns) {
  Tiling t;
  t.images = even(p.images, images);
  t.rows = even(p.out_height, rows);
  t.columns = even(p.out_width, columns);
  t.in_rows = (t.rows - 1) * p.stride_height + p.kernel_height;
  t.in_columns = (t.columns - 1) * p.stride_width + p.kernel_width;
  t.pixel = units + (units % kCrowded == 0 ? kLanes : 0);
  return t;
}

Tiling tiling_of(const Conv2dParams& p, int64_t units) {
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
  Tiling t = tiling_with(p, units, images, rows, columns);
  while (t.units() * 4 > kConv2dTileBytes && t.images * t.rows * t.columns > 1) {
    if (t.images > 1) {
      images = t.images / 2;
    } else if (t.rows > 1 && (t.rows > 4 || t.columns <= kRows)) {
      rows = t.rows / 2;
    } else {
      columns = t.columns / 2;
    }
    t = tiling_with(p, units, images, rows, columns);
  }
  return t;
}

// n elements to units; half of the last pair may be missing, and is zero then.
template <typename T>
void copy(const T* from, int64_t n, float* to) {
  if constexpr (kPairs<T>) {
    std::memcpy(to, from, sizeof(T) * static_cast<size_t>(n));
    if (n % 2 != 0) std::memset(reinterpret_cast<char*>(to) + sizeof(T) * n, 0, sizeof(T));
  } else {
    for_lanes(n,
              [&](int64_t i, int lanes) { store_any(to + i, lanes, load_any(from + i, lanes)); });
  }
}

// The input of a tile to `target`.
template <typename T>
void gather(const Conv2dParams& p, const Tiling& t, const Patch& patch, float* target) {
  const T* x = static_cast<const T*>(p.x);
  const int64_t row_units = t.in_columns * t.pixel;
  const int64_t first_row = patch.row * p.stride_height - p.padding_top;
  const int64_t first_column = patch.column * p.stride_width - p.padding_left;
  // The columns [begin, end) of the tile lie in the image.
  const int64_t begin = std::clamp<int64_t>(-first_column, 0, t.in_columns);
  const int64_t end = std::clamp<int64_t>(p.width - first_column, begin, t.in_columns);
  const bool dense = p.x_stride[2] == p.channels && t.pixel * kUnit<T> == p.channels;
  for (int64_t i = 0; i < patch.images; ++i) {
    for (int64_t r = 0; r < t.in_rows; ++r) {
      float* to = target + (i * t.in_rows + r) * row_units;
      const int64_t row = first_row + r;
      if (row < 0 || row >= p.height || begin == end || p.channels == 0) {
        std::memset(to, 0, sizeof(float) * static_cast<size_t>(row_units));
        continue;
      }
      std::memset(to, 0, sizeof(float) * static_cast<size_t>(begin * t.pixel));
      std::memset(to + end * t.pixel, 0,
                  sizeof(float) * static_cast<size_t>((t.in_columns - end) * t.pixel));
      const T* from = x + (patch.image + i) * p.x_stride[0] + row * p.x_stride[1] +
                      (first_column + begin) * p.x_stride[2];
      if (dense) {
        copy(from, (end - begin) * p.channels, to + begin * t.pixel);
        continue;
      }
      for (int64_t c = begin; c < end; ++c, from += p.x_stride[2]) {
        copy(from, p.channels, to + c * t.pixel);
      }
    }
  }
}

// Rows [0, count) of the weights, of which `length` elements lie beside each other, some taps of a
// channel after those of another, to their place in the panel.
template <typename T>
void pack_by_channel(const T* corner, int64_t row, int64_t count, int64_t length, int64_t taps,
                     int64_t depth, float* column) {
  int64_t tap = 0;
  int64_t channel = 0;
  for (int64_t u = 0; u < length; u += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, length - u));
    VFloat block[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      block[i] = i < count ? load_any(corner + i * row + u, lanes).v : VFloat{};
    }
    transpose(block);
    for (int i = 0; i < lanes; ++i) {
      float* place = column + (tap * depth + channel / kUnit<T>)*kColumns;
#if defined(__AVX512BF16__)
      if constexpr (kPairs<T>) {  // the first of a pair is the lower half of its word
        __m512i word = _mm512_castps_si512((__m512)block[i]);
        if (channel % 2 == 0) {
          word = _mm512_srli_epi32(word, 16);
        } else {
          word = _mm512_or_si512(word, _mm512_load_si512(place));
        }
        _mm512_store_si512(place, word);
      } else {
        store(place, block[i]);
      }
#else
      store(place, block[i]);
#endif
      if (++tap == taps) {
        tap = 0;
        ++channel;
      }
    }
  }
}

// The same of channels that lie beside each other, for each of the taps, `step` elements apart.
template <typename T>
void pack_by_tap(const T* corner, int64_t row, int64_t count, int64_t length, int64_t taps,
                 int64_t step, int64_t depth, float* column) {
  for (int64_t tap = 0; tap < taps; ++tap, corner += step) {
    for (int64_t u = 0; u < depth; u += kLanes) {
      VFloat block[kLanes];
      const int64_t left = length - u * kUnit<T>;
      for (int i = 0; i < kLanes; ++i) {
        const T* from = corner + i * row + u * kUnit<T>;
        block[i] = i < count ? load_units(from, left) : VFloat{};
      }
      transpose(block);
      const int64_t lanes = std::min<int64_t>(kLanes, depth - u);
      for (int i = 0; i < lanes; ++i) store(column + (tap * depth + u + i) * kColumns, block[i]);
    }
  }
}

// The units [from, to) of the rows of the weights that make the output channels from `first`, to
// panel: [taps][to - from][kColumns], zeros past the last output channel.
template <typename T>
void pack(const Conv2dParams& p, int64_t first, int64_t from, int64_t to, float* panel) {
  const int64_t taps = p.kernel_height * p.kernel_width;
  const int64_t channel = from * kUnit<T>;
  const int64_t channels = std::min(to * kUnit<T>, p.channels) - channel;
  const int64_t row = p.channels * taps;
  for (int v = 0; v < kVecs; ++v) {
    const int64_t begin = first + v * kLanes;
    const int64_t count = std::clamp<int64_t>(p.out_channels - begin, 0, kLanes);
    const T* corner = static_cast<const T*>(p.weight) + begin * row;
    float* column = panel + v * kLanes;
    if (p.weight_channels_last) {
      pack_by_tap<T>(corner + channel, row, count, channels, taps, p.channels, to - from, column);
    } else {
      pack_by_channel<T>(corner + channel * taps, row, count, channels * taps, taps, to - from,
                         column);
    }
  }
}

// A panel and how to walk along the taps with it.
struct Panel {
  const float* weights;
  int64_t depth;  // units
  int64_t kernel_height, kernel_width;
  int64_t next_row;  // units between the rows and columns of the tile
  int64_t next_column;
};

// The sums of kCount output pixels from x on: groups of kGroup pixels, `group` units apart, of
// pixels that are `stride` units apart.
// Not inlined: among the code around it g++ may spill one of the sums in every turn.
template <typename Unit, int kCount, int kGroup = 3>
__attribute__((noinline)) void multiply(const float* x, int64_t stride, int64_t group,
                                        const Panel& panel, VFloat* result) {
  constexpr int kBases = (kCount + kGroup - 1) / kGroup;
  VFloat sums[kCount * kVecs];
  unrolled<kCount * kVecs>([&](auto i) { sums[i] = VFloat{}; });
  const float* weights = panel.weights;
  for (int64_t dy = 0; dy < panel.kernel_height; ++dy) {
    for (int64_t dx = 0; dx < panel.kernel_width; ++dx) {
      const float* corner = x + dy * panel.next_row + dx * panel.next_column;
      const float* base[kBases];
      unrolled<kBases>([&](auto b) { base[b] = corner + b * group; });
#pragma GCC unroll 1
      for (int64_t u = 0; u < panel.depth; ++u) {
        VFloat w[kVecs];
        unrolled<kVecs>([&](auto v) { w[v] = load(weights + v * kLanes).v; });
        weights += kColumns;
        unrolled<kCount>([&](auto r) {
          unrolled<kVecs>([&](auto v) {
            VFloat& sum = sums[r * kVecs + v];
            sum = multiply_add<Unit>(base[r / kGroup] + r % kGroup * stride, w[v], sum);
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

// A tile by the units [from, to) of the panel of the output channels from `first`; `waiting`
// has its sums, [pixels][kColumns], unless these are all of them.
template <typename T>
void multiply_tile(const Conv2dParams& p, const Tiling& t, const Patch& patch, const float* x,
                   const Panel& panel, int64_t first, int64_t from, int64_t to, float* waiting) {
  using Unit = std::conditional_t<kPairs<T>, T, float>;
  const int64_t stride = p.stride_width * t.pixel;
  const int64_t group = 3 * stride;
  const int64_t next_row = p.stride_height * panel.next_row;
  const bool last = to == units_of<T>(p.channels);
  // Uses the sums of pixels beside each other.
  const auto use = [&](int64_t image, int64_t row, int64_t column, int count, VFloat* sums) {
    float* wait = waiting + ((image * patch.rows + row) * patch.columns + column) * kColumns;
    if (from > 0) {
      for (int k = 0; k < count * kVecs; ++k) {
        sums[k] = (Vec(load(wait + k * kLanes)) + Vec(sums[k])).v;
      }
    }
    if (!last) {
      for (int k = 0; k < count * kVecs; ++k) store(wait + k * kLanes, sums[k]);
      return;
    }
    T* out = static_cast<T*>(p.out) + (patch.image + image) * p.out_stride[0] +
             (patch.row + row) * p.out_stride[1] + (patch.column + column) * p.out_stride[2];
    for (int k = 0; k < count; ++k)
      finish<T>(p, out + k * p.out_stride[2], first, sums + k * kVecs);
  };
  VFloat sums[kRows * kVecs];
  for (int64_t i = 0; i < patch.images; ++i) {
    for (int64_t r = 0; r < patch.rows; ++r) {
      const float* row = x + from + i * t.in_rows * panel.next_row + r * next_row;
      if (patch.columns <= kFew && r + 1 < patch.rows) {
        // A product waits for the one before on the same sums: few of them leave it idle.
        multiply<Unit, kMore, kFew>(row, stride, next_row, panel, sums);
        const int count = static_cast<int>(patch.columns);
        use(i, r, 0, count, sums);
        use(i, ++r, 0, count, sums + kFew * kVecs);
        continue;
      }
      for (int64_t c = 0; c < patch.columns;) {
        const auto [count, taken] = next_block(patch.columns - c);
        if (taken == kFew) {
          multiply<Unit, kFew>(row + c * stride, stride, group, panel, sums);
        } else if (taken == kMore) {
          multiply<Unit, kMore>(row + c * stride, stride, group, panel, sums);
        } else {
          multiply<Unit, kRows>(row + c * stride, stride, group, panel, sums);
        }
        use(i, r, c, count, sums);
        c += count;
      }
    }
  }
}

template <typename T>
void run(const Conv2dParams& given) {
  const Conv2dParams p = with_long_rows(given);
  const int64_t units = units_of<T>(p.channels);
  const Tiling t = tiling_of(p, units);
  const int64_t taps = p.kernel_height * p.kernel_width;
  const int64_t tiles = patches(p, t);
  const int64_t panels = pieces(p.out_channels, kColumns);
  const int64_t depth = std::min(units, std::max<int64_t>(kMaxDepth / taps, 1));
  const int64_t step = units == 0 ? 1 : even(units, depth);
  // A block at the end of the last row reads up to kRows pixels past it.
  const int64_t tile_floats = round_up(t.units() + kRows * p.stride_width * t.pixel, kLanes);
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
        std::memset(x + t.units(), 0, sizeof(float) * (tile_floats - t.units()));
        int64_t gathered = -1;
        Patch patch{};
        for (int64_t i = begin; i < end; ++i) {
          if (gathered != i / panels) {
            gathered = i / panels;
            patch = patch_at(p, t, gathered);
            gather<T>(p, t, patch, x);
          }
          const int64_t first = i % panels * kColumns;
          for (int64_t from = 0; from == 0 || from < units; from += step) {
            const int64_t to = std::min(from + step, units);
            pack<T>(p, first, from, to, weights);
            const Panel panel{
                weights, to - from, p.kernel_height, p.kernel_width, t.in_columns * t.pixel,
                t.pixel};
            multiply_tile<T>(p, t, patch, x, panel, first, from, to, waiting);
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
