#include <torch/csrc/stable/ops.h>

#include "kernels/group_norm_apply/group_norm_apply.h"
#include "kernels/group_norm_stats/group_norm_stats.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

void group_norm_stats_op(const Tensor& x, const OptionalTensor& x2, const OptionalTensor& add,
                         int64_t num_groups, int64_t frames, bool accumulate, const Tensor& out) {
  const DeviceScope scope(x);
  const TensorView view = view_of(x);
  const OptionalView view2 = view_of(x2);
  OptionalTensor workspace;
  const int64_t floats = group_norm_stats_workspace(view, view2, num_groups, frames);
  if (floats > 0) workspace = torch::stable::new_empty(out, {floats});
  group_norm_stats(view, view2, view_of(add), num_groups, frames, accumulate, view_of(out),
                   view_of(workspace), scope.stream());
}

void group_norm_apply_op(const Tensor& x, const OptionalTensor& x2, const OptionalTensor& add,
                         const Tensor& stats, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& scale,
                         const OptionalTensor& shift, int64_t num_groups, int64_t frames,
                         double eps, bool silu, const Tensor& out) {
  const DeviceScope scope(x);
  group_norm_apply(view_of(x), view_of(x2), view_of(add), view_of(stats), view_of(weight),
                   view_of(bias), view_of(scale), view_of(shift), num_groups, frames, eps, silu,
                   view_of(out), scope.stream());
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("group_norm_stats", TORCH_BOX(&accelrt::bindings::group_norm_stats_op));
  m.impl("group_norm_apply", TORCH_BOX(&accelrt::bindings::group_norm_apply_op));
}

STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("group_norm_stats", TORCH_BOX(&accelrt::bindings::group_norm_stats_op));
  m.impl("group_norm_apply", TORCH_BOX(&accelrt::bindings::group_norm_apply_op));
}
