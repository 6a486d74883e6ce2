// The softmax of scores that lie in registers as tiles of C (tile.h): a row of scores belongs to
// the four lanes of a quad, and a lane has parts of two rows, g and g + 8. Weights are powers of
// two, rounded before they are summed, so that those used add up to one.
#pragma once

#include <cmath>

#include "accelrt/tile.h"

namespace accelrt {

constexpr float kLog2E = 1.44269504088896341f;

// 2^x: relative error below 2^-22, and zero where the result would be subnormal. -inf gives 0.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(ACCELRT_HOST_SIM)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Over the lanes of a quad.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The largest score of row g (kHalf 0) or g + 8 (kHalf 1), in the whole quad. A NaN is passed over.
template <int kHalf, int kTiles>
__device__ __forceinline__ float row_max(const float (&scores)[kTiles][4]) {
  float top = -INFINITY;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    top = fmaxf(top, fmaxf(scores[n][2 * kHalf], scores[n][2 * kHalf + 1]));
  }
  return quad_max(top);
}

// Weights 2^(score - top) of two neighbouring tiles of scores, as one tile of A. `top` is that of
// rows g and g + 8; this lane's share of the sums of both rows is added to `total`.
template <typename T>
__device__ __forceinline__ void weigh_tiles(const float (&left)[4], const float (&right)[4],
                                            const float (&top)[2], float (&total)[2],
                                            uint32_t (&weights)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    weights[half] = pack_pair<T>(fast_exp2(left[2 * half] - top[half]),
                                 fast_exp2(left[2 * half + 1] - top[half]));
    weights[2 + half] = pack_pair<T>(fast_exp2(right[2 * half] - top[half]),
                                     fast_exp2(right[2 * half + 1] - top[half]));
    float a, b, c, d;
    unpack_pair<T>(weights[half], a, b);
    unpack_pair<T>(weights[2 + half], c, d);
    total[half] += (a + b) + (c + d);
  }
}

}  // namespace accelrt
