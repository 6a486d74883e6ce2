#include "kernels/feature_delta/feature_delta.h"

#include "accelrt/backend.h"

namespace accelrt {

void feature_delta(const TensorView& a, const TensorView& b, int p, const OptionalView& workspace,
                   const TensorView& out, Stream stream) {
  constexpr const char* op = "feature_delta";
  ACCELRT_CHECK(a.ndim >= 1 && a.ndim <= 5, op, ": a has ", a.ndim, " dimensions, expected 1 to 5");
  ACCELRT_CHECK(p == 1 || p == 2, op, ": p is ", p, ", expected 1 or 2");
  check_same_type(op, "b", b, a);
  check_same_shape(op, "b", b, a);
  check_float32(op, "out", out, a);
  ACCELRT_CHECK(out.ndim == 1 && out.size[0] == a.size[0], op, ": out must be of size ", a.size[0]);
  // Samples without elements still have a result: 0.
  if (a.size[0] == 0) return;

  FeatureDeltaParams params;
  params.batch = a.size[0];
  if (a.numel() > 0) {
    const TensorView* const tensors[] = {&a, &b};
    params.rows = make_rows<2>(tensors, true, false);
    params.rows_per_sample = params.rows.rows / params.batch;
  }
  params.a = a.data;
  params.b = b.data;
  params.out = out.ptr<float>();
  params.out_stride = out.stride[0];
  params.p = p;
  params.dtype = a.dtype;
  if (a.device == Device::kCUDA) {
    const int64_t needed = feature_delta_workspace(a);
    ACCELRT_CHECK(workspace && workspace->numel() >= needed, op, ": the workspace needs ", needed,
                  " elements");
    check_float32(op, "workspace", *workspace, a);
    params.workspace = workspace->ptr<float>();
    params.blocks = feature_delta_blocks(params.batch, a.numel() / params.batch);
  }
  ACCELRT_RUN(a.device, feature_delta_cpu, launch_feature_delta, params, stream);
}

}  // namespace accelrt
