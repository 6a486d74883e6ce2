#include <torch/csrc/stable/ops.h>

#include "kernels/feature_delta/feature_delta.h"
#include "kernels/guided_step/guided_step.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

void guided_step_op(const Tensor& sample, const Tensor& cond, const OptionalTensor& uncond,
                    const OptionalTensor& history, double guidance_scale, double sample_coef,
                    double eps_coef, double history_coef, const Tensor& out,
                    const OptionalTensor& eps_out) {
  const DeviceScope scope(sample);
  guided_step(view_of(sample), view_of(cond), view_of(uncond), view_of(history),
              static_cast<float>(guidance_scale), static_cast<float>(sample_coef),
              static_cast<float>(eps_coef), static_cast<float>(history_coef), view_of(out),
              view_of(eps_out), scope.stream());
}

void feature_delta_op(const Tensor& a, const Tensor& b, int64_t p, const Tensor& out) {
  const DeviceScope scope(a);
  const TensorView view = view_of(a);
  OptionalTensor workspace;
  if (a.is_cuda()) {
    workspace = torch::stable::new_empty(a, {feature_delta_workspace(view)},
                                         torch::headeronly::ScalarType::Float);
  }
  feature_delta(view, view_of(b), static_cast<int>(p), view_of(workspace), view_of(out),
                scope.stream());
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("guided_step", TORCH_BOX(&accelrt::bindings::guided_step_op));
  m.impl("feature_delta", TORCH_BOX(&accelrt::bindings::feature_delta_op));
}

STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("guided_step", TORCH_BOX(&accelrt::bindings::guided_step_op));
  m.impl("feature_delta", TORCH_BOX(&accelrt::bindings::feature_delta_op));
}
