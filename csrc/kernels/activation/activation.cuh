// Elementwise: every thread moves kVec elements at a time over a grid-stride loop whose index
// runs over (row, chunk of the row). Bandwidth-bound; 16-byte accesses where the alignment of
// all pointers and strides allows them.
#pragma once

#include "accelrt/device.h"
#include "kernels/activation/activation.h"

namespace accelrt {

template <typename T_, int kVec_, ActivationKind kKind_>
struct ActivationTraits {
  using T = T_;
  static constexpr int kVec = kVec_;
  static constexpr ActivationKind kKind = kKind_;
  static constexpr int kThreads = 256;
  static_assert(sizeof(T) * kVec <= 16, "one access is at most 16 bytes");
};

template <ActivationKind kKind>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kKind == ActivationKind::kSiLU) {
    return silu(x);
  } else if constexpr (kKind == ActivationKind::kGELU) {
    return gelu(x);
  } else {
    return gelu_tanh(x);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) activation_kernel(const ActivationParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec;
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t chunks = p.rows.inner / kVec;  // kVec divides the row, or is 1
  const int64_t total = p.rows.rows * chunks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const int64_t at = (i % chunks) * kVec;
    int64_t offset[2];
    p.rows.offsets(i / chunks, offset);
    // No __restrict__: out may be x.
    const T* x = static_cast<const T*>(p.x) + offset[0] + at * p.rows.inner_stride[0];
    T* out = static_cast<T*>(p.out) + offset[1] + at * p.rows.inner_stride[1];
    float v[kVec];
    load_pack<kVec>(x, v);
    if (bias != nullptr) {
      float b[kVec];
      load_pack<kVec>(bias + at, b);
#pragma unroll
      for (int k = 0; k < kVec; ++k) v[k] += b[k];
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) v[k] = activate<Traits::kKind>(v[k]);
    store_pack<kVec>(out, v);
  }
}

}  // namespace accelrt
