// The apply pass of GroupNorm: y = ((x | x2) + add - mean) * rstd * weight + bias, then
// y * (1 + scale) + shift, then SiLU if asked. out: [N, C, H, W]; may be x if there is no x2.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/group_norm_source.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

// [N, C], or [C] with n = 0; null data reads as zero.
struct ChannelTable {
  const void* data = nullptr;
  int64_t n = 0;
  int64_t c = 0;
};

struct GroupNormApplyParams {
  GroupNormSource source;
  const float* stats = nullptr;  // [N / frames, G, 3]
  ChannelTable weight;
  ChannelTable bias;
  ChannelTable scale;
  ChannelTable shift;
  float eps = 0.f;
  bool silu = false;
  void* out = nullptr;
  ImageStrides out_stride;
};

void group_norm_apply(const TensorView& x, const OptionalView& x2, const OptionalView& add,
                      const TensorView& stats, const OptionalView& weight, const OptionalView& bias,
                      const OptionalView& scale, const OptionalView& shift, int64_t num_groups,
                      int64_t frames, double eps, bool silu, const TensorView& out,
                      Stream stream = nullptr);

ACCELRT_DECLARE_CPU(group_norm_apply_cpu, GroupNormApplyParams)
ACCELRT_DECLARE_CPU_BF16(group_norm_apply_cpu, GroupNormApplyParams)
void launch_group_norm_apply(const GroupNormApplyParams& params, Stream stream);

}  // namespace accelrt
