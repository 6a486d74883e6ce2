#include "kernels/layer_norm/layer_norm.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

void layer_norm_modulate_op(const Tensor& x, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& scale,
                            const OptionalTensor& shift, double eps, const Tensor& out) {
  const DeviceScope scope(x);
  layer_norm_modulate(view_of(x), view_of(weight), view_of(bias), view_of(scale), view_of(shift),
                      eps, view_of(out), scope.stream());
}

void gate_residual_layer_norm_modulate_op(const Tensor& x, const Tensor& residual,
                                          const OptionalTensor& gate, const OptionalTensor& weight,
                                          const OptionalTensor& bias, const OptionalTensor& scale,
                                          const OptionalTensor& shift, const OptionalTensor& inject,
                                          const OptionalTensor& inject_scale, double eps,
                                          const Tensor& out, const Tensor& residual_out) {
  const DeviceScope scope(x);
  gate_residual_layer_norm_modulate(view_of(x), view_of(residual), view_of(gate), view_of(weight),
                                    view_of(bias), view_of(scale), view_of(shift), view_of(inject),
                                    view_of(inject_scale), eps, view_of(out), view_of(residual_out),
                                    scope.stream());
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&accelrt::bindings::layer_norm_modulate_op));
  m.impl("gate_residual_layer_norm_modulate",
         TORCH_BOX(&accelrt::bindings::gate_residual_layer_norm_modulate_op));
}

STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&accelrt::bindings::layer_norm_modulate_op));
  m.impl("gate_residual_layer_norm_modulate",
         TORCH_BOX(&accelrt::bindings::gate_residual_layer_norm_modulate_op));
}
