#include "kernels/weighted_sum/weighted_sum.h"

#include "accelrt/backend.h"

namespace accelrt {
namespace {

constexpr const char* kOp = "weighted_sum";

void check_contiguous(const char* name, const TensorView& t) {
  if (t.numel() == 0) return;
  int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    ACCELRT_CHECK(t.size[d] == 1 || t.stride[d] == expected, kOp, ": ", name, " has stride ",
                  t.stride[d], " in dimension ", d, ", expected ", expected, " (contiguous)");
    expected *= t.size[d];
  }
}

// [B, ...]: the shape of one slot.
void check_sample(const char* name, const TensorView& t, const TensorView& features) {
  check_same_type(kOp, name, t, features);
  ACCELRT_CHECK(t.ndim == features.ndim - 1, kOp, ": ", name, " has ", t.ndim,
                " dimensions, expected ", features.ndim - 1);
  for (int d = 0; d < t.ndim; ++d) {
    ACCELRT_CHECK(t.size[d] == features.size[d + 1], kOp, ": ", name, " has size ", t.size[d],
                  " in dimension ", d, ", expected ", features.size[d + 1]);
  }
  check_contiguous(name, t);
}

}  // namespace

void weighted_sum(const TensorView& features, const TensorView& weights, const OptionalView& base,
                  const TensorView& out, Stream stream) {
  ACCELRT_CHECK(features.ndim >= 2 && features.ndim <= kMaxDims, kOp, ": features has ",
                features.ndim, " dimensions, expected 2 to ", kMaxDims);
  const int64_t slots = features.size[0];
  const int64_t batch = features.size[1];
  ACCELRT_CHECK(slots >= 1 && slots <= kWeightedSumMaxSlots, kOp, ": features has ", slots,
                " slots, expected 1 to ", kWeightedSumMaxSlots);
  check_contiguous("features", features);
  check_float32(kOp, "weights", weights, features);
  ACCELRT_CHECK(weights.ndim == 2 && weights.size[0] == batch && weights.size[1] == slots, kOp,
                ": weights must be of size [", batch, ", ", slots, "]");
  check_contiguous("weights", weights);
  if (base) check_sample("base", *base, features);
  check_sample("out", out, features);
  if (out.numel() == 0) return;

  WeightedSumParams params;
  params.rows.ndim = 1;
  params.rows.rows = params.rows.size[0] = batch;
  params.rows.inner = params.rows.stride[0][0] = out.numel() / batch;
  params.rows.inner_stride[0] = 1;
  params.slots = static_cast<int>(slots);
  params.features = features.data;
  params.weights = weights.ptr<const float>();
  params.base = data_or_null(base);
  params.out = out.data;
  params.dtype = features.dtype;
  ACCELRT_RUN(features.device, weighted_sum_cpu, launch_weighted_sum, params, stream);
}

}  // namespace accelrt
