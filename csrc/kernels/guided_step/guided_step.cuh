// Elementwise and bandwidth-bound: one pass over two to four inputs. Every thread moves kVec
// elements at a time over a grid-stride loop whose index runs over (row, chunk of the row). The
// optional inputs are branches on kernel arguments, the same for all threads.
#pragma once

#include "accelrt/device.h"
#include "kernels/guided_step/guided_step.h"

namespace accelrt {

template <typename T_, int kVec_>
struct GuidedStepTraits {
  using T = T_;
  static constexpr int kVec = kVec_;
  static constexpr int kThreads = 256;
  static_assert(sizeof(T) * kVec <= 16, "one access is at most 16 bytes");
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) guided_step_kernel(const GuidedStepParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec;
  const int64_t chunks = p.rows.inner / kVec;  // kVec divides the row, or is 1
  const int64_t total = p.rows.rows * chunks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const int64_t row = p.rows.rows == 1 ? 0 : i / chunks;
    const int64_t at = (i - row * chunks) * kVec;
    int64_t offset[6];
    p.rows.offsets(row, offset);
#pragma unroll
    for (int k = 0; k < 6; ++k) offset[k] += at * p.rows.inner_stride[k];
    // No __restrict__: out may be any of the inputs.
    float sample[kVec];
    float eps[kVec];
    load_pack<kVec>(static_cast<const T*>(p.sample) + offset[1], sample);
    load_pack<kVec>(static_cast<const T*>(p.cond) + offset[2], eps);
    if (p.uncond != nullptr) {
      float uncond[kVec];
      load_pack<kVec>(static_cast<const T*>(p.uncond) + offset[3], uncond);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        eps[k] = uncond[k] + p.guidance_scale * (eps[k] - uncond[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) sample[k] = p.sample_coef * sample[k] + p.eps_coef * eps[k];
    if (p.history != nullptr) {
      float history[kVec];
      load_pack<kVec>(static_cast<const T*>(p.history) + offset[4], history);
#pragma unroll
      for (int k = 0; k < kVec; ++k) sample[k] += p.history_coef * history[k];
    }
    if (p.eps_out != nullptr) store_pack<kVec>(static_cast<T*>(p.eps_out) + offset[5], eps);
    store_pack<kVec>(static_cast<T*>(p.out) + offset[0], sample);
  }
}

}  // namespace accelrt
