// out = act(x + bias), elementwise. x, out: [..., D]; bias: [D]. out may be x.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/strided.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

enum class ActivationKind : int { kSiLU = 0, kGELU = 1, kGELUTanh = 2 };

struct ActivationParams {
  StridedRows<2> rows;  // x, out
  const void* x = nullptr;
  const void* bias = nullptr;  // indexed by the position in the row
  void* out = nullptr;
  ActivationKind kind = ActivationKind::kSiLU;
  DType dtype = DType::kFloat32;
};

void activation(const TensorView& x, const OptionalView& bias, ActivationKind kind,
                const TensorView& out, Stream stream = nullptr);

ACCELRT_DECLARE_CPU(activation_cpu, ActivationParams)
ACCELRT_DECLARE_CPU_BF16(activation_cpu, ActivationParams)
void launch_activation(const ActivationParams& params, Stream stream);

}  // namespace accelrt
