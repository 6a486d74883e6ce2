// Host-side choices shared by the row-wise elementwise CUDA launchers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "accelrt/device.h"
#include "accelrt/strided.h"

namespace accelrt {

inline bool aligned_to(const void* pointer, int64_t bytes) {
  return pointer == nullptr || reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// The largest of 16 bytes / element size or 1 element that all K tensors can be accessed by.
template <int K>
bool can_vectorise(const StridedRows<K>& rows, const void* const (&pointers)[K],
                   int64_t element_bytes) {
  const int64_t lanes = 16 / element_bytes;
  if (rows.inner % lanes != 0 || !rows.unit_inner()) return false;
  for (int k = 0; k < K; ++k) {
    if (!aligned_to(pointers[k], 16)) return false;
    for (int d = 0; d < rows.ndim; ++d) {
      if (rows.stride[k][d] % lanes != 0) return false;
    }
  }
  return true;
}

// Enough blocks to fill the largest chips several times over; the kernels loop over the rest.
inline LaunchConfig elementwise_config(int64_t items, int threads) {
  constexpr int64_t kMaxBlocks = 132 * 16;
  LaunchConfig config;
  config.threads = threads;
  config.grid_x = std::clamp<int64_t>((items + threads - 1) / threads, 1, kMaxBlocks);
  return config;
}

}  // namespace accelrt
