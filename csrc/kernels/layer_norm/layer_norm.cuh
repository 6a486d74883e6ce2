// One row belongs to a warp (several rows per block) or, when it is longer, to a block. The
// row stays in registers between the passes: its sum, its centred moments, the result. A row
// that does not fit, or is not aligned to 16 bytes, is read again in every pass instead (from
// the caches). The deviations are taken from the rounded mean and their own mean is removed
// after, so that an offset of many standard deviations costs no accuracy.
//
// Every element is read and written by one thread only, the outputs after all reads of that
// element, so that outputs may be inputs; hence no pointer is __restrict__.
#pragma once

#include "accelrt/device.h"
#include "kernels/layer_norm/layer_norm.h"

namespace accelrt {

struct LayerNormLaunch {
  LayerNormParams p;
  int row_threads = kWarpSize;  // a warp, or all threads of the block
};

// kItems: packs of kVec elements that a thread keeps in registers; 0: the row is read again.
template <typename T_, int kVec_, int kItems_, bool kResidual_>
struct LayerNormTraits {
  using T = T_;
  static constexpr int kVec = kVec_;
  static constexpr int kItems = kItems_;
  static constexpr bool kResidual = kResidual_;
  static constexpr int kMaxThreads = 512;
  static constexpr int kSharedFloats = 2 * kMaxThreads / kWarpSize;
  static_assert(sizeof(T) * kVec <= 16, "one access is at most 16 bytes");
};

// The pointers of one row; null where the tensor is absent.
template <typename Traits>
struct LayerNormRow {
  using T = typename Traits::T;
  static constexpr int kVec = Traits::kVec;
  const T* x;
  const T* residual;
  const T* inject;
  T* out;
  T* residual_out;
  const T* gate;
  const T* scale;
  const T* shift;

  __device__ __forceinline__ LayerNormRow(const LayerNormParams& p, int64_t row) {
    const int64_t b = row / p.rows;
    const int64_t s = row - b * p.rows;
    x = at(p.x, b, s);
    out = at(p.out, b, s);
    residual = at(p.residual, b, s);
    inject = at(p.inject, b, s);
    residual_out = at(p.residual_out, b, s);
    gate = at(p.gate, b);
    scale = at(p.scale, b);
    shift = at(p.shift, b);
  }

  // The elements [i, i + kVec) of r.
  __device__ __forceinline__ void load(const LayerNormParams& p, int64_t i, float (&r)[kVec]) {
    load_pack<kVec>(x + i, r);
    if constexpr (Traits::kResidual) {
      float a[kVec];
      float b[kVec];
      if (gate != nullptr) {
        load_pack<kVec>(gate + i, a);
#pragma unroll
        for (int k = 0; k < kVec; ++k) r[k] *= a[k];
      }
      load_pack<kVec>(residual + i, a);
#pragma unroll
      for (int k = 0; k < kVec; ++k) r[k] += a[k];
      if (inject != nullptr) {
        load_pack<kVec>(inject + i, a);
        if (p.inject_scale != nullptr) {
          load_pack<kVec>(static_cast<const T*>(p.inject_scale) + i, b);
#pragma unroll
          for (int k = 0; k < kVec; ++k) a[k] *= b[k];
        }
#pragma unroll
        for (int k = 0; k < kVec; ++k) r[k] += a[k];
      }
    }
  }

  // From the normalised elements y to the result.
  __device__ __forceinline__ void store(const LayerNormParams& p, int64_t i, float (&y)[kVec]) {
    float a[kVec];
    if (p.weight != nullptr) {
      load_pack<kVec>(static_cast<const T*>(p.weight) + i, a);
#pragma unroll
      for (int k = 0; k < kVec; ++k) y[k] *= a[k];
    }
    if (p.bias != nullptr) {
      load_pack<kVec>(static_cast<const T*>(p.bias) + i, a);
#pragma unroll
      for (int k = 0; k < kVec; ++k) y[k] += a[k];
    }
    if (scale != nullptr) {
      load_pack<kVec>(scale + i, a);
#pragma unroll
      for (int k = 0; k < kVec; ++k) y[k] += y[k] * a[k];
    }
    if (shift != nullptr) {
      load_pack<kVec>(shift + i, a);
#pragma unroll
      for (int k = 0; k < kVec; ++k) y[k] += a[k];
    }
    store_pack<kVec>(out + i, y);
  }

 private:
  __device__ __forceinline__ static T* at(const LayerNormParams::Rows& t, int64_t b, int64_t s) {
    if (t.data == nullptr) return nullptr;
    return static_cast<T*>(t.data) + b * t.batch_stride + s * t.row_stride;
  }
  __device__ __forceinline__ static const T* at(const LayerNormParams::PerSample& t, int64_t b) {
    return t.data == nullptr ? nullptr : static_cast<const T*>(t.data) + b * t.batch_stride;
  }
};

// The sums over the threads of the row, in every one of them. `scratch` holds N floats per
// warp and may be used again right after.
template <int N>
__device__ __forceinline__ void row_sums(float (&x)[N], bool whole_block, float* scratch) {
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = warp_sum(x[n]);
  if (!whole_block) return;
  const int warps = blockDim.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) scratch[threadIdx.x / kWarpSize * N + n] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = 0.f;
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] += scratch[w * N + n];
  }
  __syncthreads();
}

struct Normaliser {
  float mean;
  float rstd;
  float rest;  // mean of the deviations from the rounded mean, times rstd

  __device__ __forceinline__ float operator()(float x) const { return (x - mean) * rstd - rest; }
};

__device__ __forceinline__ Normaliser make_normaliser(float mean, const float (&moments)[2],
                                                      float width, float eps) {
  const float rest = moments[0] / width;
  const float rstd = rsqrtf(fmaxf(moments[1] / width - rest * rest, 0.f) + eps);
  return {mean, rstd, rest * rstd};
}

template <typename Traits>
__device__ __forceinline__ void normalise_in_registers(const LayerNormParams& p,
                                                       LayerNormRow<Traits>& row, int lane,
                                                       int row_threads, bool whole_block,
                                                       float* scratch) {
  constexpr int kVec = Traits::kVec;
  constexpr int kItems = Traits::kItems;
  const int width = static_cast<int>(p.width);  // it fits in the registers of a block
  float r[kItems][kVec];
  float total[1] = {0.f};
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    const int i = (n * row_threads + lane) * kVec;
    if (i >= width) continue;
    row.load(p, i, r[n]);
#pragma unroll
    for (int k = 0; k < kVec; ++k) total[0] += r[n][k];
  }
  if constexpr (Traits::kResidual) {
    // After all loads, which the compiler may not move above a store.
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int i = (n * row_threads + lane) * kVec;
      if (i < width) store_pack<kVec>(row.residual_out + i, r[n]);
    }
  }
  row_sums(total, whole_block, scratch);
  const float mean = total[0] / static_cast<float>(width);
  float moments[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    if ((n * row_threads + lane) * kVec >= width) continue;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float d = r[n][k] - mean;
      moments[0] += d;
      moments[1] += d * d;
    }
  }
  row_sums(moments, whole_block, scratch);
  const Normaliser normal = make_normaliser(mean, moments, static_cast<float>(width), p.eps);
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    const int i = (n * row_threads + lane) * kVec;
    if (i >= width) continue;
#pragma unroll
    for (int k = 0; k < kVec; ++k) r[n][k] = normal(r[n][k]);
    row.store(p, i, r[n]);
  }
}

template <typename Traits>
__device__ __forceinline__ void normalise_by_rereading(const LayerNormParams& p,
                                                       LayerNormRow<Traits>& row, int lane,
                                                       int row_threads, bool whole_block,
                                                       float* scratch) {
  constexpr int kVec = Traits::kVec;
  const int64_t first = static_cast<int64_t>(lane) * kVec;
  const int64_t step = static_cast<int64_t>(row_threads) * kVec;
  float r[kVec];
  float total[1] = {0.f};
#pragma unroll 1
  for (int64_t i = first; i < p.width; i += step) {
    row.load(p, i, r);
#pragma unroll
    for (int k = 0; k < kVec; ++k) total[0] += r[k];
  }
  row_sums(total, whole_block, scratch);
  const float width = static_cast<float>(p.width);
  const float mean = total[0] / width;
  float moments[2] = {0.f, 0.f};
#pragma unroll 1
  for (int64_t i = first; i < p.width; i += step) {
    row.load(p, i, r);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float d = r[k] - mean;
      moments[0] += d;
      moments[1] += d * d;
    }
  }
  row_sums(moments, whole_block, scratch);
  const Normaliser normal = make_normaliser(mean, moments, width, p.eps);
#pragma unroll 1
  for (int64_t i = first; i < p.width; i += step) {
    row.load(p, i, r);
    if constexpr (Traits::kResidual) store_pack<kVec>(row.residual_out + i, r);
#pragma unroll
    for (int k = 0; k < kVec; ++k) r[k] = normal(r[k]);
    row.store(p, i, r);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads)
    layer_norm_kernel(const LayerNormLaunch launch) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const LayerNormParams& p = launch.p;
  const int row_threads = launch.row_threads;
  const bool whole_block = row_threads > kWarpSize;
  const int lane = threadIdx.x % row_threads;
  const int64_t rows_per_block = blockDim.x / row_threads;
  const int64_t total = p.batch * p.rows;
  for (int64_t i = blockIdx.x * rows_per_block + threadIdx.x / row_threads; i < total;
       i += gridDim.x * rows_per_block) {
    LayerNormRow<Traits> row(p, i);
    if constexpr (Traits::kItems > 0) {
      normalise_in_registers<Traits>(p, row, lane, row_threads, whole_block, scratch);
    } else {
      normalise_by_rereading<Traits>(p, row, lane, row_threads, whole_block, scratch);
    }
  }
}

}  // namespace accelrt
