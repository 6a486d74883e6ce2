#include "kernels/guided_step/guided_step.h"

#include "accelrt/backend.h"

namespace accelrt {
namespace {

constexpr const char* kOp = "guided_step";

void check_like(const char* name, const TensorView& t, const TensorView& sample) {
  check_same_type(kOp, name, t, sample);
  check_same_shape(kOp, name, t, sample);
}

}  // namespace

void guided_step(const TensorView& sample, const TensorView& cond, const OptionalView& uncond,
                 const OptionalView& history, float guidance_scale, float sample_coef,
                 float eps_coef, float history_coef, const TensorView& out,
                 const OptionalView& eps_out, Stream stream) {
  ACCELRT_CHECK(sample.ndim >= 1 && sample.ndim <= 5, kOp, ": sample has ", sample.ndim,
                " dimensions, expected 1 to 5");
  check_like("cond", cond, sample);
  check_like("out", out, sample);
  if (uncond) check_like("uncond", *uncond, sample);
  if (history) check_like("history", *history, sample);
  if (eps_out) check_like("eps_out", *eps_out, sample);
  if (sample.numel() == 0) return;

  GuidedStepParams params;
  const TensorView* const tensors[] = {&out,
                                       &sample,
                                       &cond,
                                       uncond ? &*uncond : &out,
                                       history ? &*history : &out,
                                       eps_out ? &*eps_out : &out};
  params.rows = make_rows<6>(tensors, false, false);
  params.out = out.data;
  params.sample = sample.data;
  params.cond = cond.data;
  params.uncond = data_or_null(uncond);
  params.history = data_or_null(history);
  params.eps_out = eps_out ? eps_out->data : nullptr;
  params.guidance_scale = guidance_scale;
  params.sample_coef = sample_coef;
  params.eps_coef = eps_coef;
  params.history_coef = history_coef;
  params.dtype = sample.dtype;
  ACCELRT_RUN(sample.device, guided_step_cpu, launch_guided_step, params, stream);
}

}  // namespace accelrt
