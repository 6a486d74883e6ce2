// What the forms of conv2d share: the parts that its output is cut into.
#pragma once

#include <algorithm>

#include "kernels/conv2d/conv2d.h"
#include "kernels/linear/linear_parts.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace conv2d_parts {

using linear_parts::pieces;

// Output columns of a tile, where the kernel has columns: more make the halo no smaller.
constexpr int64_t kMaxColumns = 256;

// The size of the pieces of `total` that are as equal as can be and at most `size`.
inline int64_t even(int64_t total, int64_t size) { return pieces(total, pieces(total, size)); }

// Where a tile begins in the output, and what it has of it.
struct Patch {
  int64_t image, row, column;
  int64_t images, rows, columns;
};

// Of tiles of t.images, t.rows and t.columns.
template <typename Tiling>
int64_t patches(const Conv2dParams& p, const Tiling& t) {
  return pieces(p.images, t.images) * pieces(p.out_height, t.rows) * pieces(p.out_width, t.columns);
}

template <typename Tiling>
Patch patch_at(const Conv2dParams& p, const Tiling& t, int64_t index) {
  const int64_t across = pieces(p.out_width, t.columns);
  const int64_t down = pieces(p.out_height, t.rows);
  Patch patch;
  patch.column = index % across * t.columns;
  patch.row = index / across % down * t.rows;
  patch.image = index / across / down * t.images;
  patch.images = std::min(t.images, p.images - patch.image);
  patch.rows = std::min(t.rows, p.out_height - patch.row);
  patch.columns = std::min(t.columns, p.out_width - patch.column);
  return patch;
}

// A kernel of one pixel sees no rows: those that lie densely are one.
inline Conv2dParams with_long_rows(Conv2dParams p) {
  const bool pixels = p.kernel_height == 1 && p.kernel_width == 1 && p.stride_height == 1 &&
                      p.stride_width == 1 && p.padding_top == 0 && p.padding_left == 0;
  if (!pixels) return p;
  if (p.x_stride[1] == p.width * p.x_stride[2] && p.out_stride[1] == p.width * p.out_stride[2]) {
    p.width = p.out_width = p.width * p.height;
    p.height = p.out_height = 1;
  }
  return p;
}

}  // namespace conv2d_parts
}  // namespace ACCELRT_ISA
}  // namespace accelrt
