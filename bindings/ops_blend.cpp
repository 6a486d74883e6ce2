#include "kernels/residual_blend/residual_blend.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

void residual_blend_op(const Tensor& x, const Tensor& y, const OptionalTensor& alpha, double scale,
                       const Tensor& out) {
  const DeviceScope scope(x);
  residual_blend(view_of(x), view_of(y), view_of(alpha), static_cast<float>(scale), view_of(out),
                 scope.stream());
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("residual_blend", TORCH_BOX(&accelrt::bindings::residual_blend_op));
}

STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("residual_blend", TORCH_BOX(&accelrt::bindings::residual_blend_op));
}
