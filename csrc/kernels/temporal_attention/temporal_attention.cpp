#include "kernels/temporal_attention/temporal_attention.h"

#include "accelrt/backend.h"

namespace accelrt {
namespace {

constexpr const char* kOp = "temporal_attention";

FrameStrides strides_of(const TensorView& t) { return {t.stride[0], t.stride[1], t.stride[2]}; }

void check_keys(const char* name, const TensorView& t, const TensorView& q) {
  check_same_type(kOp, name, t, q);
  ACCELRT_CHECK(t.ndim == 4, kOp, ": ", name, " has ", t.ndim, " dimensions, expected 4");
  for (const int d : {0, 2, 3}) {
    ACCELRT_CHECK(t.size[d] == q.size[d], kOp, ": ", name, " has size ", t.size[d],
                  " in dimension ", d, ", expected ", q.size[d]);
  }
  check_unit_stride(kOp, name, t);
}

}  // namespace

void temporal_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                        int64_t num_heads, float scale, const TensorView& out, Stream stream) {
  ACCELRT_CHECK(q.ndim == 4, kOp, ": q has ", q.ndim, " dimensions, expected 4");
  ACCELRT_CHECK(num_heads >= 1 && q.size[3] % num_heads == 0, kOp, ": num_heads ", num_heads,
                " does not divide the ", q.size[3], " channels");
  const int64_t head_dim = q.size[3] / num_heads;
  ACCELRT_CHECK(head_dim <= kMaxHeadDim, kOp, ": head dim ", head_dim, " exceeds ", kMaxHeadDim);
  check_unit_stride(kOp, "q", q);
  check_keys("k", k, q);
  check_keys("v", v, k);
  ACCELRT_CHECK(v.size[1] == k.size[1], kOp, ": v has ", v.size[1], " frames, k has ", k.size[1]);
  ACCELRT_CHECK(q.size[1] <= kMaxFrames && k.size[1] >= 1 && k.size[1] <= kMaxFrames, kOp, ": ",
                q.size[1], " query and ", k.size[1], " key frames; each must be 1 to ", kMaxFrames);
  check_same_type(kOp, "out", out, q);
  check_same_shape(kOp, "out", out, q);
  check_unit_stride(kOp, "out", out);
  if (q.numel() == 0) return;

  TemporalAttentionParams params;
  params.q = q.data;
  params.k = k.data;
  params.v = v.data;
  params.out = out.data;
  params.q_stride = strides_of(q);
  params.k_stride = strides_of(k);
  params.v_stride = strides_of(v);
  params.out_stride = strides_of(out);
  params.batch = q.size[0];
  params.pixels = q.size[2];
  params.frames = static_cast<int>(q.size[1]);
  params.key_frames = static_cast<int>(k.size[1]);
  params.heads = num_heads;
  params.head_dim = static_cast<int>(head_dim);
  params.scale = scale;
  params.dtype = q.dtype;
  ACCELRT_RUN_BF16(q.device, temporal_attention_cpu, launch_temporal_attention, params, stream);
}

}  // namespace accelrt
