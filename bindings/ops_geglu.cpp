#include "kernels/geglu/geglu.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

void geglu_op(const Tensor& x, const OptionalTensor& bias, int64_t kind, const Tensor& out) {
  const DeviceScope scope(x);
  geglu(view_of(x), view_of(bias), static_cast<ActivationKind>(kind), view_of(out), scope.stream());
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("geglu", TORCH_BOX(&accelrt::bindings::geglu_op));
}

STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("geglu", TORCH_BOX(&accelrt::bindings::geglu_op));
}
