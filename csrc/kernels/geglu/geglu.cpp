#include "kernels/geglu/geglu.h"

#include "accelrt/backend.h"

namespace accelrt {

void geglu(const TensorView& x, const OptionalView& bias, ActivationKind kind,
           const TensorView& out, Stream stream) {
  constexpr const char* op = "geglu";
  ACCELRT_CHECK(x.ndim >= 1, op, ": x has no dimension");
  ACCELRT_CHECK(kind == ActivationKind::kGELU || kind == ActivationKind::kGELUTanh, op, ": kind ",
                static_cast<int>(kind), " is no gelu");
  const int last = x.ndim - 1;
  ACCELRT_CHECK(x.size[last] % 2 == 0, op, ": the last dimension of x is ", x.size[last],
                ", expected an even number");
  TensorView value = x;
  value.size[last] = x.size[last] / 2;
  check_same_type(op, "out", out, x);
  check_same_shape(op, "out", out, value);
  if (bias) {
    check_same_type(op, "bias", *bias, x);
    ACCELRT_CHECK(bias->ndim == 1 && bias->size[0] == x.size[last], op,
                  ": bias does not match the last dimension of x");
    check_unit_stride(op, "bias", *bias);
  }
  if (value.numel() == 0) return;

  const int64_t element = size_of(x.dtype);
  auto second_half = [&](const void* first, int64_t stride) {
    return static_cast<const char*>(first) + value.size[last] * stride * element;
  };
  GegluParams params;
  const TensorView* const tensors[] = {&value, &out};
  params.rows = make_rows<2>(tensors, false, bias.has_value());
  params.x = x.data;
  params.gate = second_half(x.data, x.stride[last]);
  if (bias) {
    params.bias = bias->data;
    params.gate_bias = second_half(bias->data, 1);
  }
  params.out = out.data;
  params.kind = kind;
  params.dtype = x.dtype;
  ACCELRT_RUN_BF16(x.device, geglu_cpu, launch_geglu, params, stream);
}

}  // namespace accelrt
