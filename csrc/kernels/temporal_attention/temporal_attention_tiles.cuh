// Temporal attention on the matrix primitives of a warp, for 16-bit elements in whole chunks. A
// warp computes one unit (batch, pixel, head) on its own, so that nothing waits for a block:
// 1. The rows of q, k and v, which lie a frame apart, are copied to shared memory; values arrive
//    while the scores are computed.
// 2. Of 16 queries at a time, the scores of all keys stay in registers, and so do the weights,
//    which are tiles of the second product as they are.
// 3. Of every 16 channels the outputs are summed and take the place of these queries in shared
//    memory, from where whole chunks are written.
// q is read in full before the first write: out may be q.
#pragma once

#include "accelrt/softmax_tile.h"
#include "accelrt/tile.h"
#include "kernels/temporal_attention/temporal_attention.h"

namespace accelrt {

// kKeys: T_k rounded up to 16.
template <typename T_, int kKeys_>
struct TemporalTilesTraits {
  using T = T_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kLanes = kChunkBytes / sizeof(T);  // elements of a chunk
  static constexpr int kMaxWarps = 4;
  static constexpr int64_t kWarpsShare = 48 * 1024;  // of shared memory, unless one has more
  static_assert(sizeof(T) == 2 && kKeys % 16 == 0 && kKeys <= kMaxFrames);
  // A row is an odd number of chunks, at most one longer than the head dim.
  static_assert(3 * kMaxFrames * (kMaxHeadDim + kLanes) * sizeof(T) <= 99 * 1024,
                "what sm_86, 89 and 120 have for the largest unit");
};

// What the kernel needs beside the parameters of the operator.
struct TemporalTilesLaunch {
  TemporalAttentionParams p;
  int query_rows = 0;  // T rounded up to 16
  int row = 0;         // elements between rows in shared memory, an odd number of chunks
};

// to[rows, chunks] = from[present, chunks], zero below, by the warp, without waiting.
template <typename Traits>
__device__ __forceinline__ void request_frames(const typename Traits::T* from, int64_t stride,
                                               int rows, int present, int chunks, int row_elements,
                                               int lane, typename Traits::T* to) {
  for (int i = lane; i < rows * chunks; i += kWarpSize) {
    const int row = i / chunks;
    const int channel = (i - row * chunks) * Traits::kLanes;
    const bool valid = row < present;
    copy_chunk_async(to + row * row_elements + channel, from + (valid ? row * stride : 0) + channel,
                     valid);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxWarps* kWarpSize)
    temporal_attention_tiles_kernel(const TemporalTilesLaunch launch) {
  using T = typename Traits::T;
  constexpr int kKeyTiles = Traits::kKeys / 8;
  constexpr int kLanes = Traits::kLanes;
  const TemporalAttentionParams& p = launch.p;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + warp;
  if (unit >= p.batch * p.pixels * p.heads) return;  // the whole warp, and there are no barriers
  const int64_t head = unit % p.heads;
  const int64_t pixel = unit / p.heads % p.pixels;
  const int64_t batch = unit / p.heads / p.pixels;
  const auto start = [&](const FrameStrides& stride) {
    return batch * stride.batch + pixel * stride.pixel + head * p.head_dim;
  };
  const int chunks = p.head_dim / kLanes;
  const int row = launch.row;

  T* const q =
      reinterpret_cast<T*>(shared_memory()) + warp * (launch.query_rows + 2 * Traits::kKeys) * row;
  T* const k = q + launch.query_rows * row;
  T* const v = k + Traits::kKeys * row;
  // No __restrict__: out may be q.
  request_frames<Traits>(static_cast<const T*>(p.q) + start(p.q_stride), p.q_stride.frame,
                         launch.query_rows, p.frames, chunks, row, lane, q);
  request_frames<Traits>(static_cast<const T*>(p.k) + start(p.k_stride), p.k_stride.frame,
                         Traits::kKeys, p.key_frames, chunks, row, lane, k);
  copy_commit();
  request_frames<Traits>(static_cast<const T*>(p.v) + start(p.v_stride), p.v_stride.frame,
                         Traits::kKeys, p.key_frames, chunks, row, lane, v);
  copy_commit();
  copy_wait<1>();
  __syncwarp();

  const float factor = p.scale * kLog2E;
  T* const out = static_cast<T*>(p.out) + start(p.out_stride);
  for (int first = 0; first < launch.query_rows; first += 16) {
    T* const queries = q + first * row;
    float scores[kKeyTiles][4] = {};
    for (int chunk = 0; chunk < chunks; chunk += 2) {
      const bool whole = chunk + 1 < chunks;
      uint32_t a[4] = {};
      if (whole) {
        load_tiles(a, queries + lane % 16 * row + (chunk + lane / 16) * kLanes);
      } else {
        uint32_t low[2];
        load_tiles(low, queries + lane % 16 * row + chunk * kLanes);
        a[0] = low[0];
        a[1] = low[1];
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t left[2] = {}, right[2] = {};
        if (whole) {
          uint32_t b[4];
          const T* const at = k + (8 * n + lane / 16 * 8 + lane % 8) * row;
          load_tiles(b, at + (chunk + lane / 8 % 2) * kLanes);
          left[0] = b[0];
          left[1] = b[1];
          right[0] = b[2];
          right[1] = b[3];
        } else {
          uint32_t b[2];
          load_tiles(b, k + (8 * n + lane % 16) * row + chunk * kLanes);
          left[0] = b[0];
          right[0] = b[1];
        }
        multiply_tiles<T>(scores[n], a, left);
        multiply_tiles<T>(scores[n + 1], a, right);
      }
    }

#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool present = 8 * n + 2 * t + i % 2 < p.key_frames;
        scores[n][i] = present ? scores[n][i] * factor : -INFINITY;
      }
    }
    const float top[2] = {row_max<0>(scores), row_max<1>(scores)};
    float total[2] = {};
    uint32_t weights[kKeyTiles / 2][4];
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      weigh_tiles<T>(scores[n], scores[n + 1], top, total, weights[n / 2]);
    }
    const float inverse[2] = {1.f / quad_sum(total[0]), 1.f / quad_sum(total[1])};

    if (first == 0) copy_wait<0>();
    __syncwarp();  // the values are there, and every lane has read these queries
    const auto keep = [&](const float (&sums)[4], int chunk) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<uint32_t*>(queries + (8 * half + g) * row + chunk * kLanes + 2 * t) =
            pack_pair<T>(sums[2 * half] * inverse[half], sums[2 * half + 1] * inverse[half]);
      }
    };
    int chunk = 0;
    for (; chunk + 1 < chunks; chunk += 2) {
      float sums[2][4] = {};
#pragma unroll
      for (int n = 0; n < kKeyTiles / 2; ++n) {
        uint32_t b[4];
        load_tiles_transposed(b, v + (16 * n + lane % 16) * row + (chunk + lane / 16) * kLanes);
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
        multiply_tiles<T>(sums[0], weights[n], left);
        multiply_tiles<T>(sums[1], weights[n], right);
      }
      keep(sums[0], chunk);
      keep(sums[1], chunk + 1);
    }
    if (chunk < chunks) {
      float sums[4] = {};
#pragma unroll
      for (int n = 0; n < kKeyTiles / 2; ++n) {
        uint32_t b[2];
        load_tiles_transposed(b, v + (16 * n + lane % 16) * row + chunk * kLanes);
        multiply_tiles<T>(sums, weights[n], b);
      }
      keep(sums, chunk);
    }
    __syncwarp();

    using Chunk = Pack<uint32_t, 4>;
    for (int i = lane; i < 16 * chunks; i += kWarpSize) {
      const int frame = i / chunks;
      const int channel = (i - frame * chunks) * kLanes;
      if (first + frame < p.frames) {
        *reinterpret_cast<Chunk*>(out + (first + frame) * p.out_stride.frame + channel) =
            *reinterpret_cast<const Chunk*>(queries + frame * row + channel);
      }
    }
  }
}

}  // namespace accelrt
