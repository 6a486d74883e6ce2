#include "accelrt/dispatch.h"
#include "accelrt/rows_cpu.h"
#include "kernels/weighted_sum/weighted_sum.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

// What is read for one row: base with weight one, and the slots whose weight is not zero.
template <typename T>
struct Sources {
  Sources(const WeightedSumParams& p, int64_t row, int64_t offset) {
    if (p.base != nullptr) add(static_cast<const T*>(p.base) + offset, 1.f);
    const float* weights = p.weights + row * p.slots;
    const int64_t slot = p.rows.rows * p.rows.inner;
    for (int k = 0; k < p.slots; ++k) {
      // A NaN is not zero: it reaches the result.
      if (weights[k] != 0.f) add(static_cast<const T*>(p.features) + k * slot + offset, weights[k]);
    }
  }

  void add(const T* source, float factor) {
    data[count] = source;
    weight[count++] = factor;
  }

  const T* data[kWeightedSumMaxSlots + 1];
  float weight[kWeightedSumMaxSlots + 1];
  int count = 0;
};

// out = the sum over [from, to) of a row. kCount: the number of sources, or 0 for any.
template <typename T, int kCount>
void row_piece(const Sources<T>& sources, T* out, int64_t from, int64_t to) {
  const int count = kCount > 0 ? kCount : sources.count;
  // Two pairs in flight, which the compiler may not arrange itself: out may be a source.
  constexpr int kPairs = 2;
  constexpr int64_t kStep = kPairs * 2 * kLanes;
  int64_t at = from;
  for (; at + kStep <= to; at += kStep) {
    Vec a[kPairs] = {Vec(0.f), Vec(0.f)};
    Vec b[kPairs] = {Vec(0.f), Vec(0.f)};
#pragma GCC unroll 5
    for (int k = 0; k < count; ++k) {
      const Vec weight(sources.weight[k]);
      const T* source = sources.data[k] + at;
#pragma GCC unroll 2
      for (int u = 0; u < kPairs; ++u) {
        Vec x, y;
        load_pair(source + u * 2 * kLanes, x, y);
        a[u] = fma(weight, x, a[u]);
        b[u] = fma(weight, y, b[u]);
      }
    }
#pragma GCC unroll 2
    for (int u = 0; u < kPairs; ++u) store_pair(out + at + u * 2 * kLanes, a[u], b[u]);
  }
  for_lanes(to - at, [&](int64_t i, int n) {
    Vec sum(0.f);
    for (int k = 0; k < count; ++k) {
      sum = fma(Vec(sources.weight[k]), load_any(sources.data[k] + at + i, n), sum);
    }
    store_any(out + at + i, n, sum);
  });
}

template <typename T>
void run(const WeightedSumParams& p) {
  for_row_pieces(p.rows, [&](int64_t row, const int64_t (&offset)[1], int64_t from, int64_t to) {
    const Sources<T> sources(p, row, offset[0]);
    T* out = static_cast<T*>(p.out) + offset[0];
    switch (sources.count) {
      case 1: row_piece<T, 1>(sources, out, from, to); break;
      case 2: row_piece<T, 2>(sources, out, from, to); break;
      case 3: row_piece<T, 3>(sources, out, from, to); break;
      case 4: row_piece<T, 4>(sources, out, from, to); break;
      case 5: row_piece<T, 5>(sources, out, from, to); break;
      default: row_piece<T, 0>(sources, out, from, to);
    }
  });
}

}  // namespace

void weighted_sum_cpu(const WeightedSumParams& p) {
  dispatch_dtype("weighted_sum", p.dtype, [&](auto tag) { run<typename decltype(tag)::type>(p); });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
