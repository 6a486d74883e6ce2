// Bandwidth-bound: one pass over base and the slots with a weight. A block works on one row, so
// that a weight of zero is the same branch for all of its threads. The 16-byte loads of up to
// four slots (or, with fewer slots, of several places) are issued before the first is used.
#pragma once

#include "accelrt/device.h"
#include "kernels/weighted_sum/weighted_sum.h"

namespace accelrt {

template <typename T_, int kVec_, int kSlots_>
struct WeightedSumTraits {
  using T = T_;
  static constexpr int kVec = kVec_;
  static constexpr int kSlots = kSlots_;  // 0: any number, kGroup at a time
  static constexpr int kGroup = kSlots == 0 ? 4 : kSlots;
  // Places per thread. Narrow accesses need more of them in flight.
  static constexpr int kPlaces = kVec == 1 ? 4 : kGroup >= 3 ? 1 : 4 / kGroup;
  static constexpr int kThreads = 256;
  static_assert(sizeof(T) * kVec <= 16, "one access is at most 16 bytes");
};

// store_pack, as one access: with several stores in a loop the compiler keeps a pointer per
// element and splits them.
template <int N, typename T>
__device__ __forceinline__ void store_whole(T* p, const float (&x)[N]) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Pack<T, N>) == sizeof(uint4)) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.value[i] = from_float<T>(x[i]);
    uint4 words;
    memcpy(&words, &pack, sizeof(words));
    __stwb(reinterpret_cast<uint4*>(p), words);
    return;
  }
#endif
  store_pack<N>(p, x);
}

// One row: [M] of every slot, base and out.
template <typename T, int kGroup>
struct WeightedSumRow {
  // No __restrict__: out may be base, or a slot.
  const T* features;
  int64_t slot_stride;
  int slots;
  const float* weights;
  const T* base;  // may be null
  T* out;
  float weight[kGroup];

  __device__ __forceinline__ void load_weights(int first) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) weight[k] = first + k < slots ? weights[first + k] : 0.f;
  }
};

// The elements at + u * stride, u < kPlaces, and the kVec - 1 after each.
template <typename Traits, int kPlaces>
__device__ __forceinline__ void weighted_sum_places(
    WeightedSumRow<typename Traits::T, Traits::kGroup>& row, int64_t at, int64_t stride) {
  constexpr int kVec = Traits::kVec;
  constexpr int kGroup = Traits::kGroup;
  using Access = Pack<typename Traits::T, kVec>;
  float sum[kPlaces][kVec] = {};
  if (row.base != nullptr) {
#pragma unroll
    for (int u = 0; u < kPlaces; ++u) load_pack<kVec>(row.base + at + u * stride, sum[u]);
  }
  for (int first = 0; first < row.slots; first += kGroup) {
    if (Traits::kSlots == 0) row.load_weights(first);
    Access loaded[kGroup][kPlaces] = {};
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (row.weight[k] == 0.f) continue;
      const auto* source = row.features + (first + k) * row.slot_stride + at;
#pragma unroll
      for (int u = 0; u < kPlaces; ++u) {
        loaded[k][u] = *reinterpret_cast<const Access*>(source + u * stride);
      }
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
#pragma unroll
      for (int u = 0; u < kPlaces; ++u) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) sum[u][v] += row.weight[k] * to_float(loaded[k][u].value[v]);
      }
    }
    if (Traits::kSlots != 0) break;
  }
#pragma unroll
  for (int u = 0; u < kPlaces; ++u) store_whole<kVec>(row.out + at + u * stride, sum[u]);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) weighted_sum_kernel(const WeightedSumParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec;
  constexpr int kPlaces = Traits::kPlaces;
  const int64_t sample = blockIdx.x / p.blocks;
  const int64_t block = blockIdx.x % p.blocks;
  const int64_t elements = p.rows.inner;
  WeightedSumRow<T, Traits::kGroup> row;
  row.features = static_cast<const T*>(p.features) + sample * elements;
  row.slot_stride = p.rows.rows * elements;
  row.slots = Traits::kSlots == 0 ? p.slots : Traits::kSlots;
  row.weights = p.weights + sample * row.slots;
  row.base = p.base == nullptr ? nullptr : static_cast<const T*>(p.base) + sample * elements;
  row.out = static_cast<T*>(p.out) + sample * elements;
  if (Traits::kSlots != 0) row.load_weights(0);

  // kVec divides the row, or is 1.
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kVec;
  const int64_t tile = stride * kPlaces;
  for (int64_t begin = block * tile; begin < elements; begin += p.blocks * tile) {
    const int64_t at = begin + static_cast<int64_t>(threadIdx.x) * kVec;
    if (kPlaces > 1 && begin + tile <= elements) {
      weighted_sum_places<Traits, kPlaces>(row, at, stride);
    } else {
      const int64_t end = begin + tile < elements ? begin + tile : elements;
      for (int64_t i = at; i < end; i += stride) weighted_sum_places<Traits, 1>(row, i, stride);
    }
  }
}

}  // namespace accelrt
