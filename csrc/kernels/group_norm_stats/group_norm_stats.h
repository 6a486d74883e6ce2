// The statistics pass of GroupNorm: count, mean and sum of squared deviations of every
// (clip, group), [N / frames, G, 3] in float32, optionally merged into what out holds.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/group_norm_source.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

struct GroupNormStatsParams {
  GroupNormSource source;
  bool accumulate = false;
  float* out = nullptr;        // [N / frames, G, 3]
  float* workspace = nullptr;  // CUDA only: [N, chunks, G, 3], one entry per block and group
};

// The floats of workspace that the operator needs on the device of x: none on the CPU.
int64_t group_norm_stats_workspace(const TensorView& x, const OptionalView& x2, int64_t num_groups,
                                   int64_t frames);

void group_norm_stats(const TensorView& x, const OptionalView& x2, const OptionalView& add,
                      int64_t num_groups, int64_t frames, bool accumulate, const TensorView& out,
                      const OptionalView& workspace = std::nullopt, Stream stream = nullptr);

ACCELRT_DECLARE_CPU(group_norm_stats_cpu, GroupNormStatsParams)
int64_t group_norm_stats_workspace_cuda(const GroupNormSource& source);
void launch_group_norm_stats(const GroupNormStatsParams& params, Stream stream);

}  // namespace accelrt
