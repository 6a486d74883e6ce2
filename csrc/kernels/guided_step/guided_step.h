// Classifier-free guidance and a linear scheduler update, elementwise:
// eps = uncond + guidance_scale (cond - uncond), or cond;
// out = sample_coef sample + eps_coef eps + history_coef history.
// All tensors of one shape, any strides. out may be any of the inputs.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/strided.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

struct GuidedStepParams {
  // out, sample, cond, uncond, history, eps_out; an absent one has the strides of out.
  StridedRows<6> rows;
  void* out = nullptr;
  const void* sample = nullptr;
  const void* cond = nullptr;
  const void* uncond = nullptr;   // may be null
  const void* history = nullptr;  // may be null
  void* eps_out = nullptr;        // may be null
  float guidance_scale = 1.f;
  float sample_coef = 1.f;
  float eps_coef = 0.f;
  float history_coef = 0.f;
  DType dtype = DType::kFloat32;
};

void guided_step(const TensorView& sample, const TensorView& cond, const OptionalView& uncond,
                 const OptionalView& history, float guidance_scale, float sample_coef,
                 float eps_coef, float history_coef, const TensorView& out,
                 const OptionalView& eps_out, Stream stream = nullptr);

ACCELRT_DECLARE_CPU(guided_step_cpu, GuidedStepParams)
void launch_guided_step(const GuidedStepParams& params, Stream stream);

}  // namespace accelrt
