// Views of tensors and of memory, for the blocks.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "accelrt/tensor_view.h"

namespace accelrt::blocks {

constexpr int64_t kAlignment = 64;  // of the parts of a workspace, in bytes

inline int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

inline TensorView contiguous(void* data, const TensorView& like,
                             std::initializer_list<int64_t> sizes) {
  TensorView view;
  view.data = data;
  view.dtype = like.dtype;
  view.device = like.device;
  for (const int64_t size : sizes) view.size[view.ndim++] = size;
  int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.stride[d] = stride;
    stride *= view.size[d];
  }
  return view;
}

inline void* offset_by(const TensorView& t, int64_t elements) {
  return static_cast<char*>(t.data) + elements * size_of(t.dtype);
}

// [.., n, ..] -> the `index`th of dimension d, which goes.
inline TensorView selected(const TensorView& t, int d, int64_t index) {
  TensorView view = t;
  view.data = offset_by(t, index * t.stride[d]);
  for (int i = d; i + 1 < t.ndim; ++i) {
    view.size[i] = t.size[i + 1];
    view.stride[i] = t.stride[i + 1];
  }
  --view.ndim;
  return view;
}

inline TensorView narrowed(const TensorView& t, int d, int64_t begin, int64_t count) {
  TensorView view = t;
  view.data = offset_by(t, begin * t.stride[d]);
  view.size[d] = count;
  return view;
}

// A contiguous [B, S, D] as [B * S, D].
inline TensorView as_rows(const TensorView& t) {
  return contiguous(t.data, t, {t.size[0] * t.size[1], t.size[2]});
}

// [B * S, heads * D] with any row stride as [B, S, heads, D].
inline TensorView by_head(const TensorView& rows, int64_t batch, int64_t heads) {
  TensorView view = rows;
  const int64_t length = rows.size[0] / std::max<int64_t>(batch, 1);
  const int64_t dim = rows.size[1] / heads;
  view.ndim = 4;
  view.size[0] = batch;
  view.size[1] = length;
  view.size[2] = heads;
  view.size[3] = dim;
  view.stride[0] = length * rows.stride[0];
  view.stride[1] = rows.stride[0];
  view.stride[2] = dim;
  view.stride[3] = 1;
  return view;
}

}  // namespace accelrt::blocks
