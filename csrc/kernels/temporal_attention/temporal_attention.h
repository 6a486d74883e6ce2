// Softmax attention along the frames of each pixel and head, by stride.
// q, out: [B, T, P, H * D]; k, v: [B, Tk, P, H * D]; the channel stride is 1, the others are
// free. T, Tk <= 64, D <= 256. out may be q.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

constexpr int kMaxFrames = 64;
constexpr int kMaxHeadDim = 256;

// Strides of a [batch, frames, pixels, channels] tensor, in elements.
struct FrameStrides {
  int64_t batch = 0;
  int64_t frame = 0;
  int64_t pixel = 0;
};

struct TemporalAttentionParams {
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;
  FrameStrides q_stride;
  FrameStrides k_stride;
  FrameStrides v_stride;
  FrameStrides out_stride;
  int64_t batch = 0;
  int64_t pixels = 0;
  int frames = 0;
  int key_frames = 0;
  int64_t heads = 0;
  int head_dim = 0;
  float scale = 1.f;
  DType dtype = DType::kFloat32;
};

void temporal_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                        int64_t num_heads, float scale, const TensorView& out,
                        Stream stream = nullptr);

ACCELRT_DECLARE_CPU(temporal_attention_cpu, TemporalAttentionParams)
ACCELRT_DECLARE_CPU_BF16(temporal_attention_cpu, TemporalAttentionParams)
void launch_temporal_attention(const TemporalAttentionParams& params, Stream stream);

}  // namespace accelrt
