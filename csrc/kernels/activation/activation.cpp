#include "kernels/activation/activation.h"

#include "accelrt/backend.h"

namespace accelrt {

void activation(const TensorView& x, const OptionalView& bias, ActivationKind kind,
                const TensorView& out, Stream stream) {
  constexpr const char* op = "activation";
  ACCELRT_CHECK(x.ndim >= 1, op, ": x has no dimension");
  ACCELRT_CHECK(static_cast<int>(kind) >= 0 && static_cast<int>(kind) <= 2, op, ": unknown kind ",
                static_cast<int>(kind));
  check_same_type(op, "out", out, x);
  check_same_shape(op, "out", out, x);
  if (bias) {
    check_same_type(op, "bias", *bias, x);
    ACCELRT_CHECK(bias->ndim == 1 && bias->size[0] == x.size[x.ndim - 1], op,
                  ": bias does not match the last dimension");
    check_unit_stride(op, "bias", *bias);
  }
  if (x.numel() == 0) return;

  ActivationParams params;
  const TensorView* const tensors[] = {&x, &out};
  params.rows = make_rows<2>(tensors, false, bias.has_value());
  params.x = x.data;
  params.bias = data_or_null(bias);
  params.out = out.data;
  params.kind = kind;
  params.dtype = x.dtype;
  ACCELRT_RUN_BF16(x.device, activation_cpu, launch_activation, params, stream);
}

}  // namespace accelrt
