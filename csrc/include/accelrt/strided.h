// Iteration over K tensors of one shape with arbitrary strides, as rows.
//
// The dimensions are sorted by the stride of the first tensor (so that memory is walked in
// order whatever the logical layout) and neighbours that are contiguous in all K tensors are
// merged. What is left is an inner dimension and up to kMaxDims outer ones.
#pragma once

#include <cstdint>

#include "accelrt/tensor_view.h"

namespace accelrt {

template <int K>
struct StridedRows {
  int ndim = 0;                      // outer dimensions, slowest first
  int64_t size[kMaxDims] = {};       // of the outer dimensions
  int64_t stride[K][kMaxDims] = {};  // of the outer dimensions, in elements
  int64_t inner = 1;                 // elements of a row
  int64_t inner_stride[K] = {};      // between the elements of a row
  int64_t rows = 1;                  // product of the outer sizes

  ACCELRT_HOST_DEVICE void offsets(int64_t row, int64_t (&offset)[K]) const {
    for (int k = 0; k < K; ++k) offset[k] = 0;
    for (int d = ndim - 1; d >= 0; --d) {
      const int64_t i = d == 0 ? row : row % size[d];
      if (d != 0) row /= size[d];
      for (int k = 0; k < K; ++k) offset[k] += i * stride[k][d];
    }
  }

  bool unit_inner() const {
    if (inner == 1) return true;
    for (int k = 0; k < K; ++k) {
      if (inner_stride[k] != 1) return false;
    }
    return true;
  }
};

// keep_first: the first dimension stays the slowest and is not merged (per-sample operators).
// keep_last: the last dimension stays the inner one and is not merged (a bias along it).
template <int K>
StridedRows<K> make_rows(const TensorView* const (&tensors)[K], bool keep_first, bool keep_last) {
  const TensorView& lead = *tensors[0];
  int order[kMaxDims];
  int count = 0;
  const int begin = keep_first ? 1 : 0;
  const int end = lead.ndim - (keep_last ? 1 : 0);
  for (int d = begin; d < end; ++d) {
    if (lead.size[d] == 1) continue;
    int at = count++;
    while (at > 0 && lead.stride[order[at - 1]] < lead.stride[d]) {
      order[at] = order[at - 1];
      --at;
    }
    order[at] = d;
  }
  StridedRows<K> rows;
  auto push = [&](int d, bool may_merge) {
    const int last = rows.ndim - 1;
    bool merge = may_merge && last >= 0;
    for (int k = 0; merge && k < K; ++k) {
      merge = rows.stride[k][last] == tensors[k]->stride[d] * lead.size[d];
    }
    const int slot = merge ? last : rows.ndim++;
    rows.size[slot] = merge ? rows.size[slot] * lead.size[d] : lead.size[d];
    for (int k = 0; k < K; ++k) rows.stride[k][slot] = tensors[k]->stride[d];
  };
  if (keep_first) push(0, false);
  for (int i = 0; i < count; ++i) push(order[i], !(keep_first && i == 0));
  if (keep_last) push(lead.ndim - 1, false);
  // The last pushed dimension becomes the row, unless it is the kept first one.
  if (rows.ndim > (keep_first ? 1 : 0)) {
    const int last = --rows.ndim;
    rows.inner = rows.size[last];
    for (int k = 0; k < K; ++k) rows.inner_stride[k] = rows.stride[k][last];
  }
  for (int d = 0; d < rows.ndim; ++d) rows.rows *= rows.size[d];
  return rows;
}

}  // namespace accelrt
