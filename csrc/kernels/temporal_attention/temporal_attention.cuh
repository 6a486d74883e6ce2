// For float32, and for 16-bit elements that are not in whole chunks; the others have
// temporal_attention_tiles.cuh. A unit is one (batch, pixel, head); a block computes kUnits
// neighbouring ones, whose channels are contiguous, with kUnitThreads threads each. The head dim is
// cut into chunks that fit the shared memory as floats, which bounds it whatever T and D are:
// 1. scores: for each chunk, q and k go to shared memory and every thread adds to its 4 x
//    kThreadCols scores in registers;
// 2. softmax in registers: the threads of a score row are neighbours in a warp;
// 3. the probabilities go to shared memory, and for each chunk v follows; every thread computes
//    4 x 4 outputs at a time.
// q, k, v are read once and out is written once; q is read in full before the first write, so
// out may be q. All reads of shared memory are float4: a row is an odd number of float4 long, so
// that rows lie in different banks.
#pragma once

#include <algorithm>

#include "accelrt/device.h"
#include "kernels/temporal_attention/temporal_attention.h"

namespace accelrt {

// kFrames: T and T_k rounded up to 16, 32 or 64.
template <typename T_, int kFrames_>
struct TemporalAttentionTraits {
  using T = T_;
  static constexpr int kFrames = kFrames_;
  static constexpr int kVec = 16 / sizeof(T);  // elements of one access
  static constexpr int kColThreads = kFrames == 64 ? 16 : 8;
  static constexpr int kRowThreads = kFrames / 4;
  static constexpr int kThreadRows = 4;
  static constexpr int kThreadCols = kFrames / kColThreads;
  static constexpr int kUnitThreads = kRowThreads * kColThreads;  // 32, 64, 256
  static constexpr int kThreads = kFrames == 64 ? 256 : 128;
  // Allows 128 registers: left alone, ptxas aims at 64 and spills a few.
  static constexpr int kMinBlocks = 512 / kThreads;
  static constexpr int kUnits = kThreads / kUnitThreads;
  static constexpr int kMaxChunk = 48;           // channels in shared memory
  static constexpr int kRow = kMaxChunk + 4;     // 13 float4
  static constexpr int kScoreRow = kFrames + 4;  // 5, 9, 17 float4
  static constexpr int kUnitFloats = 2 * kFrames * kRow + kFrames * kScoreRow;
  static constexpr int64_t kSharedBytes = int64_t{kUnits} * kUnitFloats * sizeof(float);
  static_assert(kThreads % kUnitThreads == 0 && kMaxChunk % kVec == 0);
  static_assert(kRow / 4 % 2 == 1 && kScoreRow / 4 % 2 == 1, "rows in different banks");
  static_assert(kSharedBytes <= 48 * 1024, "more needs an opt-in and costs occupancy");
};

// What the kernel needs beside the parameters of the operator.
struct TemporalAttentionLaunch {
  TemporalAttentionParams p;
  int chunk = 0;      // channels of a chunk, a multiple of 8
  bool wide = false;  // q, k, v and out are accessed 16 bytes at a time
};

using Float4 = Pack<float, 4>;

__device__ __forceinline__ Float4 load_float4(const float* p) {
  return *reinterpret_cast<const Float4*>(p);
}

// to[kFrames, width] = from[frames, width]; zero past the frames, and past the width up to the
// next multiple of kVec.
template <typename Traits>
__device__ __forceinline__ void load_tile(const typename Traits::T* from, int64_t stride,
                                          int frames, int width, bool wide, int thread, float* to) {
  constexpr int kVec = Traits::kVec;
  const int per_row = (width + kVec - 1) / kVec;
  for (int i = thread; i < Traits::kFrames * per_row; i += Traits::kUnitThreads) {
    const int t = i / per_row;
    const int c = (i - t * per_row) * kVec;
    float x[kVec] = {};
    if (t < frames) {
      const typename Traits::T* source = from + t * stride + c;
      if (wide) {
        load_pack<kVec>(source, x);
      } else {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          if (c + k < width) x[k] = to_float(source[k]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kVec; k += 4) {
      *reinterpret_cast<Float4*>(to + t * Traits::kRow + c + k) =
          Float4{{x[k], x[k + 1], x[k + 2], x[k + 3]}};
    }
  }
}

template <int kGroup>
__device__ __forceinline__ float group_max(float x) {
#pragma unroll
  for (int lane = kGroup / 2; lane > 0; lane /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  }
  return x;
}

template <int kGroup>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int lane = kGroup / 2; lane > 0; lane /= 2) { x += __shfl_xor_sync(0xffffffffu, x, lane); }
  return x;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    temporal_attention_kernel(const TemporalAttentionLaunch launch) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kThreadRows;
  constexpr int kCols = Traits::kThreadCols;
  const TemporalAttentionParams& p = launch.p;
  const int thread = threadIdx.x % Traits::kUnitThreads;
  const int slot = threadIdx.x / Traits::kUnitThreads;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * Traits::kUnits + slot;
  // A slot past the end works on zeros and writes nothing: every thread meets every barrier.
  const bool valid = unit < p.batch * p.pixels * p.heads;
  const int frames = valid ? p.frames : 0;
  const int key_frames = valid ? p.key_frames : 0;
  const int64_t head = unit % p.heads;
  const int64_t pixel = unit / p.heads % p.pixels;
  const int64_t batch = unit / p.heads / p.pixels;
  const int64_t channel = head * p.head_dim;
  // No __restrict__: out may be q.
  const T* q =
      static_cast<const T*>(p.q) + batch * p.q_stride.batch + pixel * p.q_stride.pixel + channel;
  const T* k =
      static_cast<const T*>(p.k) + batch * p.k_stride.batch + pixel * p.k_stride.pixel + channel;
  const T* v =
      static_cast<const T*>(p.v) + batch * p.v_stride.batch + pixel * p.v_stride.pixel + channel;
  T* out =
      static_cast<T*>(p.out) + batch * p.out_stride.batch + pixel * p.out_stride.pixel + channel;

  float* first = reinterpret_cast<float*>(shared_memory()) + slot * Traits::kUnitFloats;
  float* second = first + Traits::kFrames * Traits::kRow;
  float* scores = second + Traits::kFrames * Traits::kRow;

  // Rows row + kRowThreads * i and columns col + kColThreads * j belong to this thread.
  const int row = thread / Traits::kColThreads;
  const int col = thread % Traits::kColThreads;
  float s[kRows][kCols] = {};
  for (int c0 = 0; c0 < p.head_dim; c0 += launch.chunk) {
    const int width = std::min(launch.chunk, p.head_dim - c0);
    load_tile<Traits>(q + c0, p.q_stride.frame, frames, width, launch.wide, thread, first);
    load_tile<Traits>(k + c0, p.k_stride.frame, key_frames, width, launch.wide, thread, second);
    __syncthreads();
    for (int c = 0; c < width; c += 4) {
      Float4 a[kRows];
      Float4 b[kCols];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        a[i] = load_float4(first + (row + Traits::kRowThreads * i) * Traits::kRow + c);
      }
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        b[j] = load_float4(second + (col + Traits::kColThreads * j) * Traits::kRow + c);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
#pragma unroll
          for (int n = 0; n < 4; ++n) s[i][j] += a[i].value[n] * b[j].value[n];
        }
      }
    }
    __syncthreads();
  }

  const float factor = p.scale * 1.44269504088896341f;  // the exponentials are powers of two
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const bool inside = col + Traits::kColThreads * j < p.key_frames;
      s[i][j] = inside ? s[i][j] * factor : -INFINITY;
      top = fmaxf(top, s[i][j]);
    }
    top = group_max<Traits::kColThreads>(top);
    float total = 0.f;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      s[i][j] = exp2f(s[i][j] - top);
      total += s[i][j];
    }
    total = group_sum<Traits::kColThreads>(total);
    const float inverse = 1.f / total;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      scores[(row + Traits::kRowThreads * i) * Traits::kScoreRow + col + Traits::kColThreads * j] =
          s[i][j] * inverse;
    }
  }

  const int keys = (p.key_frames + 3) / 4 * 4;  // probabilities and values past the end are zero
  for (int c0 = 0; c0 < p.head_dim; c0 += launch.chunk) {
    const int width = std::min(launch.chunk, p.head_dim - c0);
    load_tile<Traits>(v + c0, p.v_stride.frame, key_frames, width, launch.wide, thread, first);
    __syncthreads();
    const int col_tiles = (width + 3) / 4;
    for (int tile = thread; tile < Traits::kRowThreads * col_tiles; tile += Traits::kUnitThreads) {
      const int r = tile / col_tiles;
      const int c = (tile - r * col_tiles) * 4;
      float acc[kRows][4] = {};
      for (int j = 0; j < keys; j += 4) {
        Float4 a[kRows];
        Float4 b[4];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          a[i] = load_float4(scores + (r + Traits::kRowThreads * i) * Traits::kScoreRow + j);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) b[n] = load_float4(first + (j + n) * Traits::kRow + c);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int m = 0; m < 4; ++m) acc[i][m] += a[i].value[n] * b[n].value[m];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int t = r + Traits::kRowThreads * i;
        if (t >= frames) continue;
        T* target = out + t * p.out_stride.frame + c0 + c;
        if (launch.wide) {
          store_pack<4>(target, acc[i]);
        } else {
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            if (c + n < width) target[n] = from_float<T>(acc[i][n]);
          }
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace accelrt
