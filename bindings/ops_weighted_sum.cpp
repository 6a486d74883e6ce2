#include "kernels/weighted_sum/weighted_sum.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

void weighted_sum_op(const Tensor& features, const Tensor& weights, const OptionalTensor& base,
                     const Tensor& out) {
  const DeviceScope scope(features);
  weighted_sum(view_of(features), view_of(weights), view_of(base), view_of(out), scope.stream());
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("weighted_sum", TORCH_BOX(&accelrt::bindings::weighted_sum_op));
}

STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("weighted_sum", TORCH_BOX(&accelrt::bindings::weighted_sum_op));
}
