// Two launches, deterministic and without atomics:
// 1. `blocks` blocks per sample each add up their share of |a - b|^p and |b|^p in float (every
//    thread holds kVec partial sums over a strided loop, then a block reduction) and write the
//    pair to the workspace;
// 2. one warp per sample adds the pairs in a fixed order and divides.
#pragma once

#include "accelrt/device.h"
#include "kernels/feature_delta/feature_delta.h"

namespace accelrt {

template <typename T_, int kVec_>
struct FeatureDeltaTraits {
  using T = T_;
  static constexpr int kVec = kVec_;
  static constexpr int kThreads = 256;
  static constexpr int64_t kSharedBytes = kThreads / kWarpSize * sizeof(float);
  static_assert(sizeof(T) * kVec <= 16, "one access is at most 16 bytes");
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    feature_delta_partial_kernel(const FeatureDeltaParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec;
  const int64_t sample = blockIdx.x / p.blocks;
  const int64_t block = blockIdx.x % p.blocks;
  const int64_t chunks = p.rows.inner / kVec;  // kVec divides the row, or is 1
  const int64_t total = p.rows_per_sample * chunks;
  const int64_t step = p.blocks * blockDim.x;
  float delta[kVec] = {};
  float norm[kVec] = {};
  for (int64_t i = block * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t row = p.rows_per_sample == 1 ? 0 : i / chunks;
    const int64_t at = (i - row * chunks) * kVec;
    int64_t offset[2];
    p.rows.offsets(sample * p.rows_per_sample + row, offset);
    float x[kVec];
    float y[kVec];
    load_pack<kVec>(static_cast<const T*>(p.a) + offset[0] + at * p.rows.inner_stride[0], x);
    load_pack<kVec>(static_cast<const T*>(p.b) + offset[1] + at * p.rows.inner_stride[1], y);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float gap = x[k] - y[k];
      delta[k] += p.p == 1 ? fabsf(gap) : gap * gap;
      norm[k] += p.p == 1 ? fabsf(y[k]) : y[k] * y[k];
    }
  }
  float delta_sum = 0.f;
  float norm_sum = 0.f;
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    delta_sum += delta[k];
    norm_sum += norm[k];
  }
  float* scratch = reinterpret_cast<float*>(shared_memory());
  delta_sum = block_sum(delta_sum, scratch);
  norm_sum = block_sum(norm_sum, scratch);
  if (threadIdx.x == 0) {
    p.workspace[2 * static_cast<int64_t>(blockIdx.x)] = delta_sum;
    p.workspace[2 * static_cast<int64_t>(blockIdx.x) + 1] = norm_sum;
  }
}

// One warp per sample.
__global__ void __launch_bounds__(kWarpSize)
    feature_delta_final_kernel(const FeatureDeltaParams p) {
  const int64_t sample = blockIdx.x;
  const float* pairs = p.workspace + 2 * sample * p.blocks;
  float delta = 0.f;
  float norm = 0.f;
  for (int64_t i = threadIdx.x; i < p.blocks; i += kWarpSize) {
    delta += pairs[2 * i];
    norm += pairs[2 * i + 1];
  }
  delta = warp_sum(delta);
  norm = warp_sum(norm);
  if (threadIdx.x == 0) {
    if (p.p == 2) {
      delta = sqrtf(delta);
      norm = sqrtf(norm);
    }
    constexpr float kTiny = 1.17549435e-38f;
    // A NaN sum stays: fmaxf(NaN, tiny) would hide it.
    p.out[sample * p.out_stride] = delta / (norm < kTiny ? kTiny : norm);
  }
}

}  // namespace accelrt
