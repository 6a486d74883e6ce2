// out = value * gelu(gate), where value and gate are the halves of x + bias.
// x: [..., 2 D]; bias: [2 D]; out: [..., D]. out may be the first half of x.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/strided.h"
#include "accelrt/tensor_view.h"
#include "kernels/activation/activation.h"

namespace accelrt {

struct GegluParams {
  StridedRows<2> rows;         // the value half of x, out
  const void* x = nullptr;     // the value half
  const void* gate = nullptr;  // the gate half, of the same strides
  // The halves of the bias, indexed by the position in the row; both or neither.
  const void* bias = nullptr;
  const void* gate_bias = nullptr;
  void* out = nullptr;
  ActivationKind kind = ActivationKind::kGELU;  // or kGELUTanh
  DType dtype = DType::kFloat32;
};

void geglu(const TensorView& x, const OptionalView& bias, ActivationKind kind,
           const TensorView& out, Stream stream = nullptr);

ACCELRT_DECLARE_CPU(geglu_cpu, GegluParams)
ACCELRT_DECLARE_CPU_BF16(geglu_cpu, GegluParams)
void launch_geglu(const GegluParams& params, Stream stream);

}  // namespace accelrt
