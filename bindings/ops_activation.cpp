#include "kernels/activation/activation.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

void activation_op(const Tensor& x, const OptionalTensor& bias, int64_t kind, const Tensor& out) {
  const DeviceScope scope(x);
  activation(view_of(x), view_of(bias), static_cast<ActivationKind>(kind), view_of(out),
             scope.stream());
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("activation", TORCH_BOX(&accelrt::bindings::activation_op));
}

STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("activation", TORCH_BOX(&accelrt::bindings::activation_op));
}
