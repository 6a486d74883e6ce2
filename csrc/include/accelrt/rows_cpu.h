// The loop of the row-wise elementwise CPU kernels. Include from <op>_cpu.cpp only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "accelrt/parallel.h"
#include "accelrt/strided.h"
#include "accelrt/vec.h"

namespace accelrt {
namespace ACCELRT_ISA {

// n elements `stride` apart. Both layouts of a row go through vectors, so that a result does not
// depend on the layout in any bit.
template <typename T>
inline Vec load_strided(const T* p, int64_t stride, int n) {
  T lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i * stride];
  return load(lanes);
}

template <typename T>
inline void store_strided(T* p, int64_t stride, int n, Vec a) {
  T lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i * stride] = lanes[i];
}

// Element `at` of a row and the n - 1 after it; kUnit: the stride is 1.
template <bool kUnit, typename T>
inline Vec load_row(const T* row, int64_t at, int64_t stride, int n) {
  return kUnit ? load_any(row + at, n) : load_strided(row + at * stride, stride, n);
}

template <bool kUnit, typename T>
inline void store_row(T* row, int64_t at, int64_t stride, int n, Vec a) {
  if constexpr (kUnit) {
    store_any(row + at, n, a);
  } else {
    store_strided(row + at * stride, stride, n, a);
  }
}

// The offsets of consecutive rows; a step costs an addition, not divisions.
template <int K>
class RowCursor {
 public:
  RowCursor(const StridedRows<K>& rows, int64_t row) : rows_(rows) {
    for (int d = rows.ndim - 1; d >= 0; --d) {
      index_[d] = row % rows.size[d];
      row /= rows.size[d];
      for (int k = 0; k < K; ++k) offset_[k] += index_[d] * rows.stride[k][d];
    }
  }

  const int64_t (&offset() const)[K] { return offset_; }

  void next() {
    for (int d = rows_.ndim - 1; d >= 0; --d) {
      ++index_[d];
      for (int k = 0; k < K; ++k) offset_[k] += rows_.stride[k][d];
      if (index_[d] < rows_.size[d]) return;
      for (int k = 0; k < K; ++k) offset_[k] -= index_[d] * rows_.stride[k][d];
      index_[d] = 0;
    }
  }

 private:
  const StridedRows<K>& rows_;
  int64_t index_[kMaxDims] = {};
  int64_t offset_[K] = {};
};

// Calls fn(row, offset, from, to) for pieces [from, to) of rows, in parallel. Long rows are cut,
// so that the threads share a single one; short rows are grouped, so that small work stays on
// one thread.
template <int K, typename Fn>
void for_row_pieces(const StridedRows<K>& rows, const Fn& fn) {
  constexpr int64_t kPiece = 16384;
  const int64_t pieces = (rows.inner + kPiece - 1) / kPiece;
  const int64_t grain = std::max<int64_t>(1, kPiece / std::min(rows.inner, kPiece));
  parallel_for(0, rows.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    int64_t row = begin / pieces;
    int64_t piece = begin % pieces;
    RowCursor<K> cursor(rows, row);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = piece * kPiece;
      fn(row, cursor.offset(), from, std::min(from + kPiece, rows.inner));
      if (++piece == pieces) {
        piece = 0;
        ++row;
        cursor.next();
      }
    }
  });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
