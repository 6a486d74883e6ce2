// Elementwise over the output: every thread moves kVec elements of both halves at a time, in a
// grid-stride loop whose index runs over (row, chunk of the row). The work of the erf form is
// close to what the memory allows, so the index is divided in 32 bits where it fits.
#pragma once

#include "accelrt/device.h"
#include "kernels/geglu/geglu.h"

namespace accelrt {

template <typename T_, int kVec_, ActivationKind kKind_>
struct GegluTraits {
  using T = T_;
  static constexpr int kVec = kVec_;
  static constexpr ActivationKind kKind = kKind_;
  static constexpr int kThreads = 256;
  static_assert(sizeof(T) * kVec <= 16, "one access is at most 16 bytes");
  static_assert(kKind != ActivationKind::kSiLU, "the gate is a gelu");
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) geglu_kernel(const GegluParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec;
  const T* value_bias = static_cast<const T*>(p.bias);
  const T* gate_bias = static_cast<const T*>(p.gate_bias);
  const int64_t chunks = p.rows.inner / kVec;  // kVec divides the row, or is 1
  const int64_t total = p.rows.rows * chunks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const bool narrow = total <= 0x7fffffff;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const int64_t row =
        narrow ? static_cast<uint32_t>(i) / static_cast<uint32_t>(chunks) : i / chunks;
    const int64_t at = (i - row * chunks) * kVec;
    int64_t offset[2];
    p.rows.offsets(row, offset);
    // No __restrict__: out may be the first half of x.
    const int64_t from = offset[0] + at * p.rows.inner_stride[0];
    float v[kVec];
    float g[kVec];
    load_pack<kVec>(static_cast<const T*>(p.x) + from, v);
    load_pack<kVec>(static_cast<const T*>(p.gate) + from, g);
    if (value_bias != nullptr) {
      float b[kVec];
      load_pack<kVec>(value_bias + at, b);
#pragma unroll
      for (int k = 0; k < kVec; ++k) v[k] += b[k];
      load_pack<kVec>(gate_bias + at, b);
#pragma unroll
      for (int k = 0; k < kVec; ++k) g[k] += b[k];
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      if constexpr (Traits::kKind == ActivationKind::kGELU) {
        v[k] *= gelu(g[k]);
      } else {
        v[k] *= gelu_tanh(g[k]);
      }
    }
    store_pack<kVec>(static_cast<T*>(p.out) + offset[1] + at * p.rows.inner_stride[1], v);
  }
}

}  // namespace accelrt
