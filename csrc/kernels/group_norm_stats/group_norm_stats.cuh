// Two launches. The first cuts every image into chunks of pixels and leaves (count, mean, M2) of
// each chunk and group in the workspace; the second merges the chunks of a clip, one warp for a
// group. No atomics: the order of all sums is fixed by the sizes alone.
//
// Channels-last: a thread keeps kVec channels and walks down the pixels; the rows of threads of
// a block then merge through shared memory, a warp for a group, so that groups need not align
// with the vectors. Everything else: a block takes one group, its threads walk over
// (channel, pixel).
//
// A thread sums (x - pivot) and (x - pivot)^2 with its own first element as the pivot; what
// threads leave is merged with Chan's formula around a reference near the mean, so that the
// roundings are of the size of the deviation, not of the mean.
#pragma once

#include "accelrt/device.h"
#include "accelrt/welford.h"
#include "kernels/group_norm_stats/group_norm_stats.h"

namespace accelrt {

struct GroupNormPartialParams {
  GroupNormSource source;
  float* partial = nullptr;  // [N, chunks, G, 3]
  int chunks = 0;            // of an image
  int chunk = 0;             // pixels
  int slab_groups = 0;       // channels-last: groups of a block
  int rows = 0;              // channels-last: pixels that the threads of a block read at once
};

struct GroupNormMergeParams {
  const float* partial = nullptr;  // [clips, items, G, 3]
  float* out = nullptr;            // [clips, G, 3]
  int64_t clips = 0;
  int64_t items = 0;
  int64_t groups = 0;
  bool accumulate = false;
};

template <typename T_, int kVec_>
struct GroupNormStatsTraits {
  using T = T_;
  static constexpr int kVec = kVec_;
  static constexpr int kThreads = 256;
  static_assert(sizeof(T) * kVec <= 16, "one access is at most 16 bytes");
};

// The moments of the warp, in lane 0.
__device__ __forceinline__ Welford warp_merge(Welford w) {
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) {
    const float count = __shfl_down_sync(0xffffffffu, w.count, lane);
    const float mean = __shfl_down_sync(0xffffffffu, w.mean, lane);
    const float m2 = __shfl_down_sync(0xffffffffu, w.m2, lane);
    w.merge(count, mean, m2);
  }
  return w;
}

__device__ __forceinline__ void store_moments(float* out, const Welford& w, float reference) {
  out[0] = w.count;
  out[1] = w.mean + reference;
  out[2] = w.m2;
}

template <typename T>
__device__ __forceinline__ float added(const GroupNormSource& s, int64_t image, int64_t channel) {
  if (s.add == nullptr) return 0.f;
  return to_float(static_cast<const T*>(s.add)[image * s.add_stride_n + channel * s.add_stride_c]);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    group_norm_stats_channels_last_kernel(const GroupNormPartialParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec;
  const GroupNormSource& s = p.source;
  const int group_channels = static_cast<int>(s.group_channels);
  const int slab_channels = p.slab_groups * group_channels;
  const int vectors = slab_channels / kVec;  // kVec divides the slab
  const int64_t image = blockIdx.x / p.chunks;
  const int chunk = blockIdx.x % p.chunks;
  const int begin = chunk * p.chunk;
  const int64_t rest = s.pixels() - begin;
  const int pixels = static_cast<int>(rest < p.chunk ? rest : p.chunk);
  float* mean = reinterpret_cast<float*>(shared_memory());  // [rows, slab_channels]
  float* m2 = mean + p.rows * slab_channels;                // [rows, slab_channels]

  const int row = threadIdx.x / vectors;
  if (row < p.rows && row < pixels) {
    const int at = threadIdx.x % vectors * kVec;
    const int64_t channel = static_cast<int64_t>(blockIdx.y) * slab_channels + at;
    const GroupNormPart& part = s.part[s.parts == 2 && channel >= s.part[1].first ? 1 : 0];
    const T* __restrict__ x =
        static_cast<const T*>(part.data) + image * part.stride.n + (channel - part.first);
    float pivot[kVec];
    float s1[kVec];
    float s2[kVec];
    load_pack<kVec>(x + s.offset(part.stride, begin + row), pivot);
#pragma unroll
    for (int k = 0; k < kVec; ++k) s1[k] = s2[k] = 0.f;
#pragma unroll 4
    for (int i = row + p.rows; i < pixels; i += p.rows) {
      float v[kVec];
      load_pack<kVec>(x + s.offset(part.stride, begin + i), v);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float d = v[k] - pivot[k];
        s1[k] += d;
        s2[k] = fmaf(d, d, s2[k]);
      }
    }
    const float count = static_cast<float>((pixels - row + p.rows - 1) / p.rows);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const Welford w = Welford::from_sums(count, pivot[k], s1[k], s2[k]);
      mean[row * slab_channels + at + k] = w.mean;
      m2[row * slab_channels + at + k] = w.m2;
    }
  }
  __syncthreads();

  const int lane = threadIdx.x % kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  const int used = p.rows < pixels ? p.rows : pixels;
  for (int group = threadIdx.x / kWarpSize; group < p.slab_groups; group += warps) {
    const int first = group * group_channels;
    const int64_t channel = static_cast<int64_t>(blockIdx.y) * slab_channels + first;
    const float reference = mean[first];
    Welford w;
    for (int i = lane; i < used * group_channels; i += kWarpSize) {
      const int r = i / group_channels;
      const int c = i % group_channels;
      const int slot = r * slab_channels + first + c;
      w.merge(static_cast<float>((pixels - r + p.rows - 1) / p.rows),
              (mean[slot] - reference) + added<T>(s, image, channel + c), m2[slot]);
    }
    w = warp_merge(w);
    if (lane == 0) {
      const int64_t g = static_cast<int64_t>(blockIdx.y) * p.slab_groups + group;
      store_moments(p.partial + (static_cast<int64_t>(blockIdx.x) * s.groups + g) * 3, w,
                    reference);
    }
  }
}

// kVec neighbouring pixels at a time (planar), or one element of any layout.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    group_norm_stats_group_kernel(const GroupNormPartialParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec;
  const GroupNormSource& s = p.source;
  const int group_channels = static_cast<int>(s.group_channels);
  const int64_t image = blockIdx.x / p.chunks;
  const int begin = static_cast<int>(blockIdx.x % p.chunks) * p.chunk;
  const int64_t rest = s.pixels() - begin;
  const int pixels = static_cast<int>(rest < p.chunk ? rest : p.chunk);
  const int vectors = pixels / kVec;  // kVec divides the chunks and the image
  const int64_t first = static_cast<int64_t>(blockIdx.y) * s.group_channels;
  const bool channel_fastest = kVec == 1 && s.part[0].stride.c == 1;

  const auto address = [&](int64_t channel, int pixel) {
    const GroupNormPart& part = s.part[s.parts == 2 && channel >= s.part[1].first ? 1 : 0];
    return static_cast<const T*>(part.data) + image * part.stride.n +
           (channel - part.first) * part.stride.c + s.offset(part.stride, pixel);
  };
  const float reference = to_float(*address(first, begin)) + added<T>(s, image, first);
  float pivot = 0.f;
  float s1 = 0.f;
  float s2 = 0.f;
  int count = 0;
  for (int i = threadIdx.x; i < group_channels * vectors; i += blockDim.x) {
    const int c = channel_fastest ? i % group_channels : i / vectors;
    const int at = channel_fastest ? i / group_channels : i % vectors * kVec;
    float v[kVec];
    load_pack<kVec>(address(first + c, begin + at), v);
    const float add = added<T>(s, image, first + c);
    if (count == 0) pivot = v[0] + add;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float d = v[k] + add - pivot;
      s1 += d;
      s2 = fmaf(d, d, s2);
    }
    count += kVec;
  }
  Welford w = Welford::from_sums(static_cast<float>(count), pivot - reference, s1, s2);
  w = warp_merge(w);
  float* scratch = reinterpret_cast<float*>(shared_memory());  // [warps, 3]
  if (threadIdx.x % kWarpSize == 0) store_moments(scratch + threadIdx.x / kWarpSize * 3, w, 0.f);
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < static_cast<int>(blockDim.x) / kWarpSize; ++i) {
      w.merge(scratch[3 * i], scratch[3 * i + 1], scratch[3 * i + 2]);
    }
    store_moments(p.partial + (static_cast<int64_t>(blockIdx.x) * s.groups + blockIdx.y) * 3, w,
                  reference);
  }
}

// One warp for a (clip, group).
template <int kThreads>
__global__ void __launch_bounds__(kThreads) group_norm_merge_kernel(const GroupNormMergeParams p) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  if (index >= p.clips * p.groups) return;
  const int64_t clip = index / p.groups;
  const int64_t group = index % p.groups;
  const float* __restrict__ partial = p.partial + (clip * p.items * p.groups + group) * 3;
  const float reference = p.items > 0 ? partial[1] : 0.f;
  Welford w;
  for (int64_t i = threadIdx.x % kWarpSize; i < p.items; i += kWarpSize) {
    const float* m = partial + i * p.groups * 3;
    w.merge(m[0], m[1] - reference, m[2]);
  }
  w = warp_merge(w);
  if (threadIdx.x % kWarpSize == 0) {
    float* out = p.out + index * 3;
    if (p.accumulate) w.merge(out[0], out[1] - reference, out[2]);
    store_moments(out, w, reference);
  }
}

}  // namespace accelrt
