#include "kernels/residual_blend/residual_blend.h"

#include "accelrt/backend.h"

namespace accelrt {

void residual_blend(const TensorView& x, const TensorView& y, const OptionalView& alpha,
                    float scale, const TensorView& out, Stream stream) {
  constexpr const char* op = "residual_blend";
  ACCELRT_CHECK(x.ndim >= 1 && x.ndim <= 5, op, ": x has ", x.ndim, " dimensions, expected 1 to 5");
  check_same_type(op, "y", y, x);
  check_same_shape(op, "y", y, x);
  check_same_type(op, "out", out, x);
  check_same_shape(op, "out", out, x);
  if (alpha) {
    check_float32(op, "alpha", *alpha, x);
    ACCELRT_CHECK(alpha->ndim == 1 && (alpha->size[0] == 1 || alpha->size[0] == x.size[0]), op,
                  ": alpha must be of size 1 or ", x.size[0]);
  }
  if (x.numel() == 0) return;

  const bool per_sample = alpha && alpha->size[0] > 1;
  ResidualBlendParams params;
  const TensorView* const tensors[] = {&out, &x, &y};
  params.rows = make_rows<3>(tensors, per_sample, false);
  params.x = x.data;
  params.y = y.data;
  params.out = out.data;
  params.alpha = alpha ? alpha->ptr<const float>() : nullptr;
  params.alpha_stride = per_sample ? alpha->stride[0] : 0;
  params.rows_per_sample = per_sample ? params.rows.rows / x.size[0] : params.rows.rows;
  params.scale = scale;
  params.dtype = x.dtype;
  ACCELRT_RUN(x.device, residual_blend_cpu, launch_residual_blend, params, stream);
}

}  // namespace accelrt
