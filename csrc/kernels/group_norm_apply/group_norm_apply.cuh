// Elementwise, one launch for each of the two sources: y = (x - centre) * gain + offset, where
// the three fold all factors of an (image, channel). The centre is subtracted rather than
// folded into the offset, which would cancel where |mean| is much larger than the deviation.
//
// Channels-last: a thread keeps the coefficients of kVec channels in registers and walks down
// the pixels. Everything else: a block computes the coefficients of its channels into shared
// memory and walks over (channel, pixel), kVec pixels at a time where the layout is planar.
#pragma once

#include "accelrt/device.h"
#include "kernels/group_norm_apply/group_norm_apply.h"

namespace accelrt {

struct GroupNormTileParams {
  GroupNormApplyParams op;
  int part = 0;
  int chunks = 0;         // of an image's pixels
  int chunk = 0;          // pixels
  int channel_chunk = 0;  // channels of a block
  int rows = 0;           // channels-last: pixels that the threads of a block read at once
};

template <typename T_, int kVec_>
struct GroupNormApplyTraits {
  using T = T_;
  static constexpr int kVec = kVec_;
  static constexpr int kThreads = 256;
  static_assert(sizeof(T) * kVec <= 16, "one access is at most 16 bytes");
};

template <typename T>
__device__ __forceinline__ float table_value(const ChannelTable& t, int64_t image,
                                             int64_t channel) {
  return to_float(static_cast<const T*>(t.data)[image * t.n + channel * t.c]);
}

// channel: in the concatenation.
template <typename T>
__device__ __forceinline__ void channel_coefficients(const GroupNormApplyParams& p, int64_t image,
                                                     int64_t channel, float& centre, float& gain,
                                                     float& offset) {
  const GroupNormSource& s = p.source;
  const int64_t group = static_cast<unsigned>(channel) / static_cast<unsigned>(s.group_channels);
  const float* stats = p.stats + (image / s.frames * s.groups + group) * 3;
  centre = stats[1];
  gain = 1.f / sqrtf(stats[2] / stats[0] + p.eps);
  offset = 0.f;
  if (s.add != nullptr) {
    centre -= table_value<T>({s.add, s.add_stride_n, s.add_stride_c}, image, channel);
  }
  if (p.weight.data != nullptr) gain *= table_value<T>(p.weight, image, channel);
  if (p.bias.data != nullptr) offset = table_value<T>(p.bias, image, channel);
  if (p.scale.data != nullptr) {
    const float scale = 1.f + table_value<T>(p.scale, image, channel);
    gain *= scale;
    offset *= scale;
  }
  if (p.shift.data != nullptr) offset += table_value<T>(p.shift, image, channel);
}

__device__ __forceinline__ float normalised(float x, float centre, float gain, float offset,
                                            bool with_silu) {
  const float y = fmaf(x - centre, gain, offset);
  return with_silu ? silu(y) : y;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    group_norm_apply_channels_last_kernel(const GroupNormTileParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec;
  const GroupNormSource& s = p.op.source;
  const GroupNormPart& part = s.part[p.part];
  const int vectors = p.channel_chunk / kVec;
  const int64_t image = blockIdx.x / p.chunks;
  const int begin = static_cast<int>(blockIdx.x % p.chunks) * p.chunk;
  const int64_t rest = s.pixels() - begin;
  const int pixels = static_cast<int>(rest < p.chunk ? rest : p.chunk);
  const int row = threadIdx.x / vectors;
  const int64_t channel =
      static_cast<int64_t>(blockIdx.y) * p.channel_chunk + threadIdx.x % vectors * kVec;
  if (row >= p.rows || channel >= part.channels) return;
  float centre[kVec];
  float gain[kVec];
  float offset[kVec];
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    channel_coefficients<T>(p.op, image, part.first + channel + k, centre[k], gain[k], offset[k]);
  }
  // No __restrict__: out may be x.
  const T* x = static_cast<const T*>(part.data) + image * part.stride.n + channel;
  T* out = static_cast<T*>(p.op.out) + image * p.op.out_stride.n + part.first + channel;
  for (int i = row; i < pixels; i += p.rows) {
    float v[kVec];
    load_pack<kVec>(x + s.offset(part.stride, begin + i), v);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      v[k] = normalised(v[k], centre[k], gain[k], offset[k], p.op.silu);
    }
    store_pack<kVec>(out + s.offset(p.op.out_stride, begin + i), v);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    group_norm_apply_tile_kernel(const GroupNormTileParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec;
  const GroupNormSource& s = p.op.source;
  const GroupNormPart& part = s.part[p.part];
  const ImageStrides& to = p.op.out_stride;
  const int64_t image = blockIdx.x / p.chunks;
  const int begin = static_cast<int>(blockIdx.x % p.chunks) * p.chunk;
  const int64_t rest = s.pixels() - begin;
  const int pixels = static_cast<int>(rest < p.chunk ? rest : p.chunk);
  const int vectors = pixels / kVec;  // kVec divides the chunks and the image
  const int64_t first = static_cast<int64_t>(blockIdx.y) * p.channel_chunk;
  const int64_t left = part.channels - first;
  const int channels = static_cast<int>(left < p.channel_chunk ? left : p.channel_chunk);
  float* centre = reinterpret_cast<float*>(shared_memory());  // [channel_chunk] each
  float* gain = centre + p.channel_chunk;
  float* offset = gain + p.channel_chunk;
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    channel_coefficients<T>(p.op, image, part.first + first + c, centre[c], gain[c], offset[c]);
  }
  __syncthreads();

  const bool channel_fastest = kVec == 1 && part.stride.c == 1;
  // No __restrict__: out may be x.
  const T* x = static_cast<const T*>(part.data) + image * part.stride.n + first * part.stride.c;
  T* out = static_cast<T*>(p.op.out) + image * to.n + (part.first + first) * to.c;
  for (int i = threadIdx.x; i < channels * vectors; i += blockDim.x) {
    const int c = channel_fastest ? i % channels : i / vectors;
    const int at = begin + (channel_fastest ? i / channels : i % vectors * kVec);
    float v[kVec];
    load_pack<kVec>(x + c * part.stride.c + s.offset(part.stride, at), v);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      v[k] = normalised(v[k], centre[c], gain[c], offset[c], p.op.silu);
    }
    store_pack<kVec>(out + c * to.c + s.offset(to, at), v);
  }
}

}  // namespace accelrt
