// FlashAttention-2 (arXiv 2307.08691) on the matrix primitives of a warp, for head dims in steps of
// eight. A block takes a run of queries of one head, a warp 16 or 32 of them:
// 1. Keys and values come in tiles of kKeys, in the order k0 v0 k1 v1 .., through a ring of slots
//    in shared memory; the copies of the next kSlots - 1 tiles are under way while one is used.
// 2. A warp multiplies its queries with the keys of a tile. The scores stay in registers, where the
//    weights are tiles of the second product as they are.
// 3. Outputs and sums are relative to the row's maximum so far and rescaled when it rises, which is
//    rare after the first tiles. (To let the maximum lag behind, by up to 2^8, costs accuracy: the
//    largest weight is then no power of two but rounded, and the error 1.1 of what it is here.)
// Channels are padded to eight. Where that leaves half a step of the first product, its upper half
// is zero in registers.
// A block reads its queries before it writes, and to the same rows: out may be q.
#pragma once

#include "accelrt/softmax_tile.h"
#include "accelrt/tile.h"
#include "kernels/attention/attention.h"

namespace accelrt {

// kDim: D rounded up to one that has an instance.
template <typename T_, int kDim_>
struct AttentionTraits {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kLanes = kChunkBytes / sizeof(T);  // elements of a chunk
  static constexpr int kChunks = kDim / kLanes;           // of a row
  static constexpr int kSteps = (kChunks + 1) / 2;        // of the first product, 16 channels each
  static constexpr int kRow = (kChunks | 1) * kLanes;     // between rows in shared memory
  // Two tiles of queries halve what a product reads from shared memory; at 256 the outputs alone
  // would be all registers.
  static constexpr int kQueryTiles = kDim <= 160 ? 2 : 1;
  static constexpr int kQueries = 16 * kQueryTiles;  // of a warp
  static constexpr int kMaxWarps = kDim <= 160 ? 4 : 8;
  // What the outputs leave of the registers: none may be spilled.
  static constexpr int kKeys = kDim <= 96 ? 64 : kDim <= 128 ? 48 : 32;
  static constexpr int kTile = kKeys * kRow;  // elements of a slot
  // As many as leave shared memory for two blocks in the 100 KiB of sm_86, 89 and 120, or where
  // only one fits there, in the 164 KiB of sm_80.
  static constexpr int kSlots = kDim <= 40 ? 4 : kDim <= 72 || kDim == 128 || kDim == 160 ? 3 : 2;
  static constexpr bool kHoldQueries = kDim <= 80;  // in registers

  static constexpr int64_t shared_bytes(int warps) {
    return (kSlots * kTile + int64_t{warps} * kQueries * kRow) * sizeof(T);
  }
  static_assert(sizeof(T) == 2 && kDim % kLanes == 0 && kDim <= kMaxAttentionDim);
  static_assert(kKeys % 16 == 0 && kSlots >= 2);
  static_assert(kRow / kLanes % 2 == 1, "load_tiles meets no bank conflicts");
  static_assert(shared_bytes(kMaxWarps) <= 99 * 1024, "the most that sm_86, 89 and 120 have");
};

// What the kernel needs beside the parameters of the operator.
struct AttentionLaunch {
  AttentionParams p;
  float factor = 1.f;       // of the scores, in units of log 2
  bool bias_pairs = false;  // two neighbouring elements of a bias are one aligned word
};

// to[rows, kDim] = from[present, chunks], zero elsewhere, by the whole block, without waiting.
template <typename Traits>
__device__ __forceinline__ void request_rows(const typename Traits::T* from, int64_t stride,
                                             int rows, int present, int chunks,
                                             typename Traits::T* to) {
#pragma unroll 2  // more addresses at a time cost registers that the products need
  for (int i = threadIdx.x; i < rows * Traits::kChunks; i += blockDim.x) {
    const int row = i / Traits::kChunks;
    const int chunk = i - row * Traits::kChunks;
    const bool valid = row < present && chunk < chunks;
    const int64_t offset = valid ? row * stride + chunk * Traits::kLanes : 0;
    copy_chunk_async(to + row * Traits::kRow + chunk * Traits::kLanes, from + offset, valid);
  }
}

// Step `step` of 16 channels of 16 queries, as a tile of A.
template <typename Traits>
__device__ __forceinline__ void load_queries(const typename Traits::T* rows, int step, int lane,
                                             uint32_t (&a)[4]) {
  const typename Traits::T* const row = rows + lane % 16 * Traits::kRow;
  const int chunk = 2 * step;
  if (chunk + 1 < Traits::kChunks) {
    load_tiles(a, row + (chunk + lane / 16) * Traits::kLanes);
  } else {
    uint32_t low[2];
    load_tiles(low, row + chunk * Traits::kLanes);
    a[0] = low[0];
    a[1] = low[1];
    a[2] = a[3] = 0;
  }
}

// The same of 16 keys, as two tiles of B for eight keys each.
template <typename Traits>
__device__ __forceinline__ void load_keys(const typename Traits::T* rows, int step, int lane,
                                          uint32_t (&left)[2], uint32_t (&right)[2]) {
  const int chunk = 2 * step;
  if (chunk + 1 < Traits::kChunks) {
    uint32_t b[4];
    const int row = lane / 16 * 8 + lane % 8;
    load_tiles(b, rows + row * Traits::kRow + (chunk + lane / 8 % 2) * Traits::kLanes);
    left[0] = b[0];
    left[1] = b[1];
    right[0] = b[2];
    right[1] = b[3];
  } else {
    uint32_t b[2];
    load_tiles(b, rows + lane % 16 * Traits::kRow + chunk * Traits::kLanes);
    left[0] = b[0];
    right[0] = b[1];
    left[1] = right[1] = 0;
  }
}

// scores = factor * scores + bias, in units of log 2, of one row; `bias` is at the lane's first
// column, of which `present` and those to the right exist.
template <typename T, int kTiles>
__device__ __forceinline__ void add_bias(const T* bias, int present, bool pairs, float factor,
                                         int half, float (&scores)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float low = 0.f, high = 0.f;
    if (pairs) {
      if (8 * n < present)
        unpack_pair<T>(*reinterpret_cast<const uint32_t*>(bias + 8 * n), low, high);
    } else {
      if (8 * n < present) low = to_float(bias[8 * n]);
      if (8 * n + 1 < present) high = to_float(bias[8 * n + 1]);
    }
    scores[n][2 * half] = fmaf(scores[n][2 * half], factor, low * kLog2E);
    scores[n][2 * half + 1] = fmaf(scores[n][2 * half + 1], factor, high * kLog2E);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxWarps* kWarpSize)
    attention_kernel(const AttentionLaunch launch) {
  using T = typename Traits::T;
  constexpr int kKeyTiles = Traits::kKeys / 8;
  const AttentionParams& p = launch.p;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int block_queries = blockDim.x / kWarpSize * Traits::kQueries;
  const int64_t blocks = (p.queries + block_queries - 1) / block_queries;
  const int64_t first_query = blockIdx.x % blocks * block_queries;
  const int64_t head = blockIdx.x / blocks % p.heads;
  const int64_t batch = blockIdx.x / blocks / p.heads;
  const int chunks = p.head_dim / Traits::kLanes;
  const int keys = static_cast<int>(p.keys);
  const int tiles = (keys + Traits::kKeys - 1) / Traits::kKeys;
  const auto start = [&](const void* tensor, const TokenStrides& stride) {
    return static_cast<const T*>(tensor) + batch * stride.batch + head * stride.head;
  };
  // No __restrict__: out may be q.
  const T* const k = start(p.k, p.k_stride);
  const T* const v = start(p.v, p.v_stride);

  T* const slots = reinterpret_cast<T*>(shared_memory());
  T* const block_rows = slots + Traits::kSlots * Traits::kTile;
  T* const own_rows = block_rows + warp * Traits::kQueries * Traits::kRow;

  // Keys (even steps) or values (odd ones) of tile step / 2. Steps past the end are empty groups of
  // copies, so that their number says which have arrived.
  const auto request = [&](int step) {
    const int first = step / 2 * Traits::kKeys;
    if (first < keys) {
      const int64_t stride = step % 2 == 0 ? p.k_stride.token : p.v_stride.token;
      request_rows<Traits>((step % 2 == 0 ? k : v) + first * stride, stride, Traits::kKeys,
                           keys - first, chunks, slots + step % Traits::kSlots * Traits::kTile);
    }
    copy_commit();
  };
  // Waits for a step. Behind the barrier all have used the step before it: its slot is free.
  const auto arrived = [&](int step) {
    copy_wait<Traits::kSlots - 2>();
    __syncthreads();
    request(step + Traits::kSlots - 1);
    return slots + step % Traits::kSlots * Traits::kTile;
  };

  const int64_t present_queries = p.queries - first_query;
  request_rows<Traits>(
      start(p.q, p.q_stride) + first_query * p.q_stride.token, p.q_stride.token, block_queries,
      static_cast<int>(present_queries < block_queries ? present_queries : block_queries), chunks,
      block_rows);
#pragma unroll
  for (int step = 0; step < Traits::kSlots - 1; ++step) request(step);

  constexpr int kHeldSteps = Traits::kHoldQueries ? Traits::kSteps : 1;
  uint32_t held[Traits::kQueryTiles][kHeldSteps][4];
  if constexpr (Traits::kHoldQueries) {
    copy_wait<Traits::kSlots - 2>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < Traits::kQueryTiles; ++m) {
#pragma unroll
      for (int step = 0; step < Traits::kSteps; ++step) {
        load_queries<Traits>(own_rows + 16 * m * Traits::kRow, step, lane, held[m][step]);
      }
    }
  }

  float out[Traits::kQueryTiles][Traits::kChunks][4] = {};
  float top[Traits::kQueryTiles][2];  // of rows g and g + 8, so far
  float total[Traits::kQueryTiles][2] = {};
#pragma unroll
  for (int m = 0; m < Traits::kQueryTiles; ++m) top[m][0] = top[m][1] = -INFINITY;

  for (int tile = 0; tile < tiles; ++tile) {
    const int first_key = tile * Traits::kKeys;
    const T* const key_rows = arrived(2 * tile);
    float scores[Traits::kQueryTiles][kKeyTiles][4] = {};
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
      uint32_t a[Traits::kQueryTiles][4];
#pragma unroll
      for (int m = 0; m < Traits::kQueryTiles; ++m) {
        if constexpr (Traits::kHoldQueries) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = held[m][step][i];
        } else {
          load_queries<Traits>(own_rows + 16 * m * Traits::kRow, step, lane, a[m]);
        }
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t left[2], right[2];
        load_keys<Traits>(key_rows + 8 * n * Traits::kRow, step, lane, left, right);
#pragma unroll
        for (int m = 0; m < Traits::kQueryTiles; ++m) {
          multiply_tiles<T>(scores[m][n], a[m], left);
          multiply_tiles<T>(scores[m][n + 1], a[m], right);
        }
      }
    }

    uint32_t weights[Traits::kQueryTiles][kKeyTiles / 2][4];
#pragma unroll
    for (int m = 0; m < Traits::kQueryTiles; ++m) {
      const int present = keys - first_key - 2 * t;  // of the keys from this lane's first one on
      if (p.bias != nullptr) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t query = first_query + warp * Traits::kQueries + 16 * m + 8 * half + g;
          const int64_t row = query < p.queries ? query : p.queries - 1;
          add_bias(start(p.bias, p.bias_stride) + row * p.bias_stride.token + first_key + 2 * t,
                   present, launch.bias_pairs, launch.factor, half, scores[m]);
        }
      } else {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[m][n][i] *= launch.factor;
        }
      }
      if (first_key + Traits::kKeys > keys) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (8 * n + i % 2 >= present) scores[m][n][i] = -INFINITY;
          }
        }
      }
      const float tops[2] = {row_max<0>(scores[m]), row_max<1>(scores[m])};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (tops[half] > top[m][half]) {
          const float shrink = fast_exp2(top[m][half] - tops[half]);
          top[m][half] = tops[half];
          total[m][half] *= shrink;
#pragma unroll
          for (int c = 0; c < Traits::kChunks; ++c) {
            out[m][c][2 * half] *= shrink;
            out[m][c][2 * half + 1] *= shrink;
          }
        }
      }
      // No key so far: 2^(-inf - 0) is the zero that it should be.
      const float from[2] = {top[m][0] == -INFINITY ? 0.f : top[m][0],
                             top[m][1] == -INFINITY ? 0.f : top[m][1]};
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        weigh_tiles<T>(scores[m][n], scores[m][n + 1], from, total[m], weights[m][n / 2]);
      }
    }

    const T* const value_rows = arrived(2 * tile + 1);
#pragma unroll
    for (int n = 0; n < kKeyTiles / 2; ++n) {
      const T* const row = value_rows + (16 * n + lane % 16) * Traits::kRow;
#pragma unroll
      for (int c = 0; c + 1 < Traits::kChunks; c += 2) {
        uint32_t b[4];
        load_tiles_transposed(b, row + (c + lane / 16) * Traits::kLanes);
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < Traits::kQueryTiles; ++m) {
          multiply_tiles<T>(out[m][c], weights[m][n], left);
          multiply_tiles<T>(out[m][c + 1], weights[m][n], right);
        }
      }
      if constexpr (Traits::kChunks % 2 != 0) {
        uint32_t b[2];
        load_tiles_transposed(b, row + (Traits::kChunks - 1) * Traits::kLanes);
#pragma unroll
        for (int m = 0; m < Traits::kQueryTiles; ++m) {
          multiply_tiles<T>(out[m][Traits::kChunks - 1], weights[m][n], b);
        }
      }
    }
  }
  copy_wait<0>();

  // Through this warp's rows in shared memory, whose queries it has used, so that a row is written
  // in whole chunks.
#pragma unroll
  for (int m = 0; m < Traits::kQueryTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(total[m][half]);
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // a row without keys
      T* const row = own_rows + (16 * m + 8 * half + g) * Traits::kRow + 2 * t;
#pragma unroll
      for (int c = 0; c < Traits::kChunks; ++c) {
        *reinterpret_cast<uint32_t*>(row + c * Traits::kLanes) =
            pack_pair<T>(out[m][c][2 * half] * inverse, out[m][c][2 * half + 1] * inverse);
      }
    }
  }
  __syncwarp();
  using Chunk = Pack<uint32_t, 4>;
  T* const target = static_cast<T*>(p.out) + batch * p.out_stride.batch + head * p.out_stride.head +
                    (first_query + warp * Traits::kQueries) * p.out_stride.token;
  for (int i = lane; i < Traits::kQueries * Traits::kChunks; i += kWarpSize) {
    const int row = i / Traits::kChunks;
    const int chunk = i - row * Traits::kChunks;
    if (chunk < chunks && first_query + warp * Traits::kQueries + row < p.queries) {
      *reinterpret_cast<Chunk*>(target + row * p.out_stride.token + chunk * Traits::kLanes) =
          *reinterpret_cast<const Chunk*>(own_rows + row * Traits::kRow + chunk * Traits::kLanes);
    }
  }
}

}  // namespace accelrt
