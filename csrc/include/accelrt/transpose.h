// Transposition of a square of kLanes vectors in registers.
#pragma once

#include "accelrt/vec.h"

namespace accelrt {
namespace ACCELRT_ISA {

// Interleaves the low (or high) halves of two vectors.
inline VFloat interleave_low(VFloat a, VFloat b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

inline VFloat interleave_high(VFloat a, VFloat b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// One step moves the top bit of the row index to the bottom of the column index and the other
// way round; log2(kLanes) steps exchange rows and columns.
inline void transpose_step(const VFloat (&x)[kLanes], VFloat (&y)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes / 2; ++i) {
    y[2 * i] = interleave_low(x[i], x[i + kLanes / 2]);
    y[2 * i + 1] = interleave_high(x[i], x[i + kLanes / 2]);
  }
}

inline void transpose(VFloat (&x)[kLanes]) {
  VFloat y[kLanes];
  transpose_step(x, y);
  transpose_step(y, x);
  if constexpr (kLanes == 4) return;
  transpose_step(x, y);
  if constexpr (kLanes == 16) {
    transpose_step(y, x);
  } else {
    std::memcpy(x, y, sizeof(y));
  }
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
