#include "kernels/group_norm_apply/group_norm_apply.h"

#include "accelrt/backend.h"

namespace accelrt {
namespace {

constexpr const char* kOp = "group_norm_apply";

ChannelTable table_of(const char* name, const OptionalView& t, const TensorView& like,
                      int64_t images, int64_t channels) {
  if (!t) return {};
  check_same_type(kOp, name, *t, like);
  if (images == 0) {
    ACCELRT_CHECK(t->ndim == 1 && t->size[0] == channels, kOp, ": ", name, " is not [C]");
    return {t->data, 0, t->stride[0]};
  }
  ACCELRT_CHECK(t->ndim == 2 && t->size[0] == images && t->size[1] == channels, kOp, ": ", name,
                " is not [N, C]");
  return {t->data, t->stride[0], t->stride[1]};
}

}  // namespace

void group_norm_apply(const TensorView& x, const OptionalView& x2, const OptionalView& add,
                      const TensorView& stats, const OptionalView& weight, const OptionalView& bias,
                      const OptionalView& scale, const OptionalView& shift, int64_t num_groups,
                      int64_t frames, double eps, bool silu, const TensorView& out, Stream stream) {
  GroupNormApplyParams params;
  params.source =
      make_group_norm_source(kOp, x, x2, add, num_groups, frames, &out, &params.out_stride);
  const GroupNormSource& s = params.source;
  check_float32(kOp, "stats", stats, x);
  ACCELRT_CHECK(stats.ndim == 3 && stats.size[0] == s.images / frames &&
                    stats.size[1] == num_groups && stats.size[2] == 3,
                kOp, ": stats is not [N / frames, G, 3]");
  if (out.numel() == 0) return;
  ACCELRT_CHECK(stats.stride[2] == 1 && stats.stride[1] == 3 &&
                    (stats.size[0] == 1 || stats.stride[0] == 3 * num_groups),
                kOp, ": stats is not contiguous");

  params.stats = stats.ptr<float>();
  params.weight = table_of("weight", weight, x, 0, s.channels);
  params.bias = table_of("bias", bias, x, 0, s.channels);
  params.scale = table_of("scale", scale, x, s.images, s.channels);
  params.shift = table_of("shift", shift, x, s.images, s.channels);
  params.eps = static_cast<float>(eps);
  params.silu = silu;
  params.out = out.data;
  ACCELRT_RUN_BF16(x.device, group_norm_apply_cpu, launch_group_norm_apply, params, stream);
}

}  // namespace accelrt
