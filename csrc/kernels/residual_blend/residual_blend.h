// out = (x + y) * scale, or (alpha x + (1 - alpha) y) * scale. x, y, out: [N, ...], any strides;
// alpha: float32 [1] or [N]. out may be x or y.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/strided.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

struct ResidualBlendParams {
  StridedRows<3> rows;  // out, x, y
  const void* x = nullptr;
  const void* y = nullptr;
  void* out = nullptr;
  const float* alpha = nullptr;
  int64_t alpha_stride = 0;     // between samples; 0 if all share one
  int64_t rows_per_sample = 1;  // with alpha_stride != 0
  float scale = 1.f;
  DType dtype = DType::kFloat32;
};

void residual_blend(const TensorView& x, const TensorView& y, const OptionalView& alpha,
                    float scale, const TensorView& out, Stream stream = nullptr);

ACCELRT_DECLARE_CPU(residual_blend_cpu, ResidualBlendParams)
void launch_residual_blend(const ResidualBlendParams& params, Stream stream);

}  // namespace accelrt
