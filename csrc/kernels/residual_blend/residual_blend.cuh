// Elementwise and bandwidth-bound: every thread moves kVec elements at a time over a grid-stride
// loop whose index runs over (row, chunk of the row).
#pragma once

#include "accelrt/device.h"
#include "kernels/residual_blend/residual_blend.h"

namespace accelrt {

template <typename T_, int kVec_>
struct ResidualBlendTraits {
  using T = T_;
  static constexpr int kVec = kVec_;
  static constexpr int kThreads = 256;
  static_assert(sizeof(T) * kVec <= 16, "one access is at most 16 bytes");
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    residual_blend_kernel(const ResidualBlendParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec;
  const int64_t chunks = p.rows.inner / kVec;  // kVec divides the row, or is 1
  const int64_t total = p.rows.rows * chunks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const int64_t row = p.rows.rows == 1 ? 0 : i / chunks;
    const int64_t at = (i - row * chunks) * kVec;
    int64_t offset[3];
    p.rows.offsets(row, offset);
    // No __restrict__: out may be x or y.
    T* out = static_cast<T*>(p.out) + offset[0] + at * p.rows.inner_stride[0];
    const T* x = static_cast<const T*>(p.x) + offset[1] + at * p.rows.inner_stride[1];
    const T* y = static_cast<const T*>(p.y) + offset[2] + at * p.rows.inner_stride[2];
    float a[kVec];
    float b[kVec];
    load_pack<kVec>(x, a);
    load_pack<kVec>(y, b);
    if (p.alpha == nullptr) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) a[k] = (a[k] + b[k]) * p.scale;
    } else {
      const int64_t sample = p.alpha_stride == 0 ? 0 : row / p.rows_per_sample;
      const float alpha = p.alpha[sample * p.alpha_stride];
      const float wx = alpha * p.scale;
      const float wy = (1.f - alpha) * p.scale;
#pragma unroll
      for (int k = 0; k < kVec; ++k) a[k] = a[k] * wx + b[k] * wy;
    }
    store_pack<kVec>(out, a);
  }
}

}  // namespace accelrt
