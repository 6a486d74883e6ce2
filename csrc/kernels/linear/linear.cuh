// out = epilogue(x weight^T + bias) on the matrix units, for 16-bit elements.
//
// A block makes a tile of out from kRows rows of x and kWeights rows of the weights; with a GEGLU
// half of these are values and half their gates, so that the [M, 2 N] of both never exists. Slices
// of kDepth elements along K pass through a ring of stages in shared memory, which asynchronous
// copies fill kStages - 1 slices ahead. One barrier per slice says two things: everybody's copies
// of it have arrived, and nobody reads the stage any more that is filled next.
//
// The four warps, two by two, hold the sums of a quarter of the tile in registers, in float32. At
// the end a warp passes them through shared memory, 16 rows at a time, so that every lane has eight
// neighbouring columns of a row: bias, gate, residual and out move in 16 bytes then, and the result
// is rounded once.
//
// In a stage the 16-byte chunk c of row r lies at place c ^ turn(r) of its row: the eight rows that
// ldmatrix reads at once lie in different banks, without padding.
#pragma once

#include "accelrt/device.h"
#include "accelrt/tile.h"
#include "kernels/linear/linear.h"

namespace accelrt {

struct LinearLaunch {
  LinearParams p;
  bool wide = false;  // eight columns of out, bias and gate are aligned to 16 bytes
  int row_tiles = 0;
  int column_tiles = 0;
};

template <typename T_, int kRows_, int kWeights_, int kDepth_, int kBlocks_, bool kGEGLU_>
struct LinearTraits {
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kWeights = kWeights_;
  static constexpr int kDepth = kDepth_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor at once
  static constexpr bool kGEGLU = kGEGLU_;
  static constexpr int kColumns = kGEGLU ? kWeights / 2 : kWeights;  // of out
  static constexpr int kStages = 3;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kLane = kChunkBytes / static_cast<int>(sizeof(T));  // elements of a chunk
  static constexpr int kChunks = kDepth / kLane;
  static constexpr int kStage = (kRows + kWeights) * kDepth;
  // The part of a warp: strips of 16 rows by pairs of eight weights.
  static constexpr int kWarpRows = kRows / 2;
  static constexpr int kWarpWeights = kWeights / 2;
  static constexpr int kWarpColumns = kColumns / 2;
  static constexpr int kStrips = kWarpRows / 16;
  static constexpr int kPairs = kWarpWeights / 16;
  // Rows of a strip in shared memory: 8 banks apart, so that a fragment is stored without conflict.
  static constexpr int kStripStride = kWarpWeights + 8;
  // Two blocks fit on every architecture (100 KiB of shared memory on sm_86, 89 and 120).
  static constexpr int64_t kSharedBytes = int64_t{kStages} * kStage * sizeof(T);
  static_assert(sizeof(T) == 2, "tiles are of 16-bit elements");
  static_assert(kChunks == 4 || kChunks == 8, "turn() knows rows of 64 and 128 bytes");
  static_assert(kWarpRows % 16 == 0 && kWarpWeights % 16 == 0);
  static_assert(!kGEGLU || kPairs % 2 == 0, "a warp has a value and its gate");
  static_assert(kWarpWeights % 32 == 0, "strips are 8 banks apart");
  static_assert(kSharedBytes <= 48 * 1024);
  static_assert(kWarps * 16 * kStripStride * sizeof(float) <= kSharedBytes);
};

namespace linear_device {

template <int kChunks>
__device__ __forceinline__ int turn(int row) {
  return row / (8 / kChunks) % kChunks;
}

// Copies of one thread: the chunk of one place along K of every kStep-th row of x and the weights.
template <typename Traits>
struct Copies {
  using T = typename Traits::T;
  static constexpr int kStep = Traits::kThreads / Traits::kChunks;
  static constexpr int kRows = Traits::kRows / kStep;
  static constexpr int kWeights = Traits::kWeights / kStep;
  static_assert(kStep % 8 == 0, "all rows of a thread have one turn");
  static_assert(Traits::kRows % kStep == 0 && Traits::kColumns % kStep == 0);

  const T* from[kRows + kWeights];
  uint32_t exist = 0;  // a bit per row
  int to;              // of the first, in a stage
  int64_t left;        // elements along K from this chunk on

  __device__ __forceinline__ Copies(const LinearParams& p, int64_t first_row,
                                    int64_t first_column) {
    const int row = threadIdx.x / Traits::kChunks;
    const int chunk = threadIdx.x % Traits::kChunks;
    const int at = chunk * Traits::kLane;
    left = p.depth - at;
    to = row * Traits::kDepth + (chunk ^ turn<Traits::kChunks>(row)) * Traits::kLane;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t index = first_row + row + i * kStep;
      set(i, static_cast<const T*>(p.x) + at, p.x_stride, index, index < p.rows);
    }
#pragma unroll
    for (int i = 0; i < kWeights; ++i) {
      const bool gate = i * kStep >= Traits::kColumns;  // only with a GEGLU
      const int64_t column = first_column + row + i * kStep - (gate ? Traits::kColumns : 0);
      const int64_t index = column + (gate ? p.columns : 0);
      set(kRows + i, static_cast<const T*>(p.weight) + at, p.weight_stride, index,
          column < p.columns);
    }
  }

  __device__ __forceinline__ void set(int i, const T* first, int64_t stride, int64_t index,
                                      bool exists) {
    from[i] = first + (exists ? index * stride : 0);
    exist |= static_cast<uint32_t>(exists) << i;
  }

  // The next slice; zeros where there is nothing.
  __device__ __forceinline__ void start(T* stage) {
#pragma unroll
    for (int i = 0; i < kRows + kWeights; ++i) {
      copy_chunk_async(stage + to + i * kStep * Traits::kDepth, from[i],
                       left > 0 && (exist >> i & 1u) != 0);
      from[i] += Traits::kDepth;
    }
    left -= Traits::kDepth;
  }
};

// Sums of a warp: kStrips times 16 rows by kPairs times 2 times 8 weights.
template <typename Traits>
using Sums = float[Traits::kStrips][2 * Traits::kPairs][4];

// sums += x weight^T of a slice, for the quarter (warp_row, warp_column) of the tile.
template <typename Traits>
__device__ __forceinline__ void multiply(const typename Traits::T* stage, int warp_row,
                                         int warp_column, Sums<Traits>& sums) {
  using T = typename Traits::T;
  constexpr int kHalf = Traits::kPairs / 2;
  const int lane = threadIdx.x % kWarpSize;
  const int swap = turn<Traits::kChunks>(lane % 8);
  const T* x = stage + (warp_row * Traits::kWarpRows + lane % 16) * Traits::kDepth;
  const T* weight = stage + (Traits::kRows + lane / 16 * 8 + lane % 8) * Traits::kDepth;
#pragma unroll
  for (int k = 0; k < Traits::kDepth / 16; ++k) {
    const int x_at = ((2 * k + lane / 16) ^ swap) * Traits::kLane;
    const int weight_at = ((2 * k + lane / 8 % 2) ^ swap) * Traits::kLane;
    uint32_t a[Traits::kStrips][4];
#pragma unroll
    for (int m = 0; m < Traits::kStrips; ++m) {
      load_tiles<4>(a[m], x + m * 16 * Traits::kDepth + x_at);
    }
#pragma unroll
    for (int n = 0; n < Traits::kPairs; ++n) {
      int row = warp_column * Traits::kWarpWeights + n * 16;
      if constexpr (Traits::kGEGLU) {
        row = warp_column * Traits::kWarpColumns + n % kHalf * 16 +
              (n < kHalf ? 0 : Traits::kColumns);
      }
      uint32_t b[4];
      load_tiles<4>(b, weight + row * Traits::kDepth + weight_at);
      const uint32_t left[2] = {b[0], b[1]};
      const uint32_t right[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < Traits::kStrips; ++m) {
        multiply_tiles<T>(sums[m][2 * n], a[m], left);
        multiply_tiles<T>(sums[m][2 * n + 1], a[m], right);
      }
    }
  }
}

// Up to eight elements; zeros beyond `count`.
template <typename T>
__device__ __forceinline__ void load_some(const T* p, bool wide, int count, float (&x)[8]) {
  if (wide && count == 8) {
    load_pack<8>(p, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < count ? to_float(p[i]) : 0.f;
}

template <typename T>
__device__ __forceinline__ void store_some(T* p, bool wide, int count, const float (&x)[8]) {
  if (wide && count == 8) {
    store_pack<8>(p, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) p[i] = from_float<T>(x[i]);
  }
}

__device__ __forceinline__ void load_sums(const float* p, float (&x)[8]) {
  float low[4], high[4];
  load_pack<4>(p, low);
  load_pack<4>(p + 4, high);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = low[i];
    x[4 + i] = high[i];
  }
}

// What follows the product, for eight columns of a row. out: their place; no __restrict__, since
// a residual is read there.
template <typename Traits>
__device__ __forceinline__ void finish(const LinearLaunch& a, const float* sums,
                                       const float (&bias)[8], const float (&gate_bias)[8],
                                       int64_t row, int64_t column, int count) {
  using T = typename Traits::T;
  const LinearParams& p = a.p;
  T* const out = static_cast<T*>(p.out) + row * p.out_stride + column;
  float y[8];
  load_sums(sums, y);
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] += bias[i];
  if constexpr (Traits::kGEGLU) {
    float gate[8];
    load_sums(sums + Traits::kWarpColumns, gate);
    const bool tanh = p.epilogue == LinearEpilogue::kGEGLUTanh;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float g = gate[i] + gate_bias[i];
      y[i] *= tanh ? gelu_tanh(g) : gelu(g);
    }
  } else if (p.epilogue == LinearEpilogue::kGELU) {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = gelu(y[i]);
  } else if (p.epilogue == LinearEpilogue::kGELUTanh) {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = gelu_tanh(y[i]);
  } else if (p.epilogue == LinearEpilogue::kGatedResidual) {
    float before[8];
    load_some(static_cast<const T*>(out), a.wide, count, before);
    if (p.gate != nullptr) {
      const int64_t sample = static_cast<uint32_t>(row) / static_cast<uint32_t>(p.rows_per_sample);
      float gate[8];
      load_some(static_cast<const T*>(p.gate) + sample * p.gate_stride + column, a.wide, count,
                gate);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] *= gate[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] += before[i];
  }
  store_some(out, a.wide, count, y);
}

// Writes the quarter of a warp whose first row and column are given. memory: one strip.
template <typename Traits>
__device__ __forceinline__ void write(const LinearLaunch& a, const Sums<Traits>& sums,
                                      float* memory, int64_t first_row, int64_t first_column) {
  using T = typename Traits::T;
  constexpr int kLanes = Traits::kWarpColumns / 8;  // of a row
  constexpr int kStep = kWarpSize / kLanes;
  const LinearParams& p = a.p;
  const int lane = threadIdx.x % kWarpSize;
  const int at = lane % kLanes * 8;
  const int64_t column = first_column + at;
  const int count = static_cast<int>(p.columns - column < 8 ? p.columns - column : 8);
  float bias[8] = {};
  float gate_bias[8] = {};
  if (p.bias != nullptr && count > 0) {
    const T* const first = static_cast<const T*>(p.bias) + column;
    load_some(first, a.wide, count, bias);
    if constexpr (Traits::kGEGLU) load_some(first + p.columns, a.wide, count, gate_bias);
  }
#pragma unroll 1
  for (int strip = 0; strip < Traits::kStrips; ++strip) {
    __syncwarp();  // the strip before has been read
    // Registers have no index: every strip has its own stores, and only the rest is shared.
#pragma unroll
    for (int m = 0; m < Traits::kStrips; ++m) {
      if (m != strip) continue;
      float* const to = memory + lane / 4 * Traits::kStripStride + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 2 * Traits::kPairs; ++n) {
        const float (&c)[4] = sums[m][n];
        store_pack<2>(to + n * 8, {c[0], c[1]});
        store_pack<2>(to + n * 8 + 8 * Traits::kStripStride, {c[2], c[3]});
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int r = lane / kLanes; r < 16; r += kStep) {
      const int64_t row = first_row + strip * 16 + r;
      if (row >= p.rows || count <= 0) continue;
      finish<Traits>(a, memory + r * Traits::kStripStride + at, bias, gate_bias, row, column,
                     count);
    }
  }
}

}  // namespace linear_device

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    linear_kernel(const LinearLaunch a) {
  using T = typename Traits::T;
  constexpr int kStages = Traits::kStages;
  // Blocks that run at once, which have neighbouring numbers, are a rectangle of tiles: up to
  // kGroup wide, then down the rows. What they read of x and of the weights is then about the
  // least, and the kGroup tiles of the weights stay in the L2 cache while all of x passes by.
  constexpr int kGroup = 8;
  const int per_group = kGroup * a.row_tiles;
  const int group = blockIdx.x / per_group;
  const int within = blockIdx.x % per_group;
  const int rest = a.column_tiles - group * kGroup;
  const int width = rest < kGroup ? rest : kGroup;
  const int64_t first_row = int64_t{within / width} * Traits::kRows;
  const int64_t first_column = int64_t{group * kGroup + within % width} * Traits::kColumns;

  T* const stages = reinterpret_cast<T*>(shared_memory());
  const int warp = threadIdx.x / kWarpSize;
  const int warp_row = warp / 2;
  const int warp_column = warp % 2;

  linear_device::Sums<Traits> sums = {};
  {
    linear_device::Copies<Traits> copies(a.p, first_row, first_column);
    const int slices = static_cast<int>((a.p.depth + Traits::kDepth - 1) / Traits::kDepth);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < slices) copies.start(stages + s * Traits::kStage);
      copy_commit();
    }
    int read = 0;
    int filled = kStages - 1;
    for (int slice = 0; slice < slices; ++slice) {
      copy_wait<kStages - 2>();
      __syncthreads();
      if (slice + kStages - 1 < slices) copies.start(stages + filled * Traits::kStage);
      copy_commit();  // an empty group too: groups are counted
      linear_device::multiply<Traits>(stages + read * Traits::kStage, warp_row, warp_column, sums);
      read = read + 1 == kStages ? 0 : read + 1;
      filled = filled + 1 == kStages ? 0 : filled + 1;
    }
    copy_wait<0>();
  }
  __syncthreads();  // the last stage has been read by all
  float* const memory =
      reinterpret_cast<float*>(shared_memory()) + warp * 16 * Traits::kStripStride;
  linear_device::write<Traits>(a, sums, memory, first_row + warp_row * Traits::kWarpRows,
                               first_column + warp_column * Traits::kWarpColumns);
}

}  // namespace accelrt
