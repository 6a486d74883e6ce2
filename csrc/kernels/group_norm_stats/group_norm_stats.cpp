#include "kernels/group_norm_stats/group_norm_stats.h"

#include "accelrt/backend.h"

namespace accelrt {

int64_t group_norm_stats_workspace(const TensorView& x, const OptionalView& x2, int64_t num_groups,
                                   int64_t frames) {
  if (x.device != Device::kCUDA) return 0;
#if defined(ACCELRT_HAVE_CUDA)
  return group_norm_stats_workspace_cuda(
      make_group_norm_source("group_norm_stats", x, x2, std::nullopt, num_groups, frames));
#else
  (void)x2;
  (void)num_groups;
  (void)frames;
  return 0;  // the operator itself raises
#endif
}

void group_norm_stats(const TensorView& x, const OptionalView& x2, const OptionalView& add,
                      int64_t num_groups, int64_t frames, bool accumulate, const TensorView& out,
                      const OptionalView& workspace, Stream stream) {
  constexpr const char* op = "group_norm_stats";
  GroupNormStatsParams params;
  params.source = make_group_norm_source(op, x, x2, add, num_groups, frames);
  check_float32(op, "out", out, x);
  ACCELRT_CHECK(out.ndim == 3 && out.size[0] == x.size[0] / frames && out.size[1] == num_groups &&
                    out.size[2] == 3,
                op, ": out is not [N / frames, G, 3]");
  ACCELRT_CHECK(out.numel() == 0 || (out.stride[2] == 1 && out.stride[1] == 3 &&
                                     (out.size[0] == 1 || out.stride[0] == 3 * num_groups)),
                op, ": out is not contiguous");
  if (out.numel() == 0) return;  // no images; an image without pixels still gets zeros

  params.accumulate = accumulate;
  params.out = out.ptr<float>();
  if (x.device == Device::kCUDA) {
    const int64_t needed = group_norm_stats_workspace(x, x2, num_groups, frames);
    ACCELRT_CHECK(needed == 0 || (workspace && workspace->numel() >= needed), op,
                  ": the workspace has ", workspace ? workspace->numel() : 0, " floats, expected ",
                  needed);
    if (workspace) {
      check_float32(op, "workspace", *workspace, x);
      params.workspace = workspace->ptr<float>();
    }
  }
  ACCELRT_RUN(x.device, group_norm_stats_cpu, launch_group_norm_stats, params, stream);
}

}  // namespace accelrt
