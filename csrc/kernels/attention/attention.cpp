#include "kernels/attention/attention.h"

#include <cstdint>

#include "accelrt/backend.h"

namespace accelrt {
namespace {

constexpr const char* kOp = "attention";

TokenStrides strides_of(const TensorView& t) { return {t.stride[0], t.stride[1], t.stride[2]}; }

void check_keys(const char* name, const TensorView& t, const TensorView& q) {
  check_same_type(kOp, name, t, q);
  ACCELRT_CHECK(t.ndim == 4, kOp, ": ", name, " has ", t.ndim, " dimensions, expected 4");
  for (const int d : {0, 2, 3}) {
    ACCELRT_CHECK(t.size[d] == q.size[d], kOp, ": ", name, " has size ", t.size[d],
                  " in dimension ", d, ", expected ", q.size[d]);
  }
  check_unit_stride(kOp, name, t);
}

void check_bias(const TensorView& bias, const TensorView& q, const TensorView& k) {
  check_same_type(kOp, "bias", bias, q);
  ACCELRT_CHECK(bias.ndim == 4, kOp, ": bias has ", bias.ndim, " dimensions, expected 4");
  const int64_t full[] = {q.size[0], q.size[2], q.size[1]};
  for (int d = 0; d < 3; ++d) {
    ACCELRT_CHECK(bias.size[d] == 1 || bias.size[d] == full[d], kOp, ": bias has size ",
                  bias.size[d], " in dimension ", d, ", expected 1 or ", full[d]);
  }
  ACCELRT_CHECK(bias.size[3] == k.size[1], kOp, ": bias has size ", bias.size[3],
                " in dimension 3, expected ", k.size[1]);
  check_unit_stride(kOp, "bias", bias);
}

}  // namespace

void check_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                     const OptionalView& bias, const TensorView& out) {
  ACCELRT_CHECK(q.ndim == 4, kOp, ": q has ", q.ndim, " dimensions, expected 4");
  ACCELRT_CHECK(q.size[3] >= 1 && q.size[3] <= kMaxAttentionDim, kOp, ": head dim ", q.size[3],
                " is not within 1 and ", kMaxAttentionDim);
  check_unit_stride(kOp, "q", q);
  check_keys("k", k, q);
  check_keys("v", v, q);
  ACCELRT_CHECK(k.size[1] >= 1, kOp, ": k has no keys; at least 1 is needed");
  ACCELRT_CHECK(v.size[1] == k.size[1], kOp, ": v has ", v.size[1], " keys, k has ", k.size[1]);
  if (bias) check_bias(*bias, q, k);
  check_same_type(kOp, "out", out, q);
  check_same_shape(kOp, "out", out, q);
  check_unit_stride(kOp, "out", out);
  ACCELRT_CHECK(q.numel() == 0 || (out.data != k.data && out.data != v.data), kOp,
                ": out overlaps k or v");
}

AttentionParams attention_params(const TensorView& q, const TensorView& k, const TensorView& v,
                                 const OptionalView& bias, double scale, const TensorView& out) {
  AttentionParams params;
  params.q = q.data;
  params.k = k.data;
  params.v = v.data;
  params.out = out.data;
  params.q_stride = strides_of(q);
  params.k_stride = strides_of(k);
  params.v_stride = strides_of(v);
  params.out_stride = strides_of(out);
  if (bias) {
    params.bias = bias->data;
    const auto stride = [&](int d) { return bias->size[d] == 1 ? 0 : bias->stride[d]; };
    params.bias_stride = {stride(0), stride(2), stride(1)};
  }
  params.batch = q.size[0];
  params.heads = q.size[2];
  params.queries = q.size[1];
  params.keys = k.size[1];
  params.head_dim = static_cast<int>(q.size[3]);
  params.scale = scale;
  params.dtype = q.dtype;
  return params;
}

bool attention_cuda_takes(const AttentionParams& p) {
  constexpr int kLanes = 8;  // 16-bit elements of 16 bytes
  const auto aligned = [&](const void* data, const TokenStrides& stride, int64_t tokens) {
    const auto steps = [](int64_t size, int64_t by) { return size <= 1 || by % kLanes == 0; };
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && steps(p.batch, stride.batch) &&
           steps(tokens, stride.token) && steps(p.heads, stride.head);
  };
  return p.dtype != DType::kFloat32 && p.head_dim % kLanes == 0 && p.keys <= INT32_MAX - 512 &&
         aligned(p.q, p.q_stride, p.queries) && aligned(p.k, p.k_stride, p.keys) &&
         aligned(p.v, p.v_stride, p.keys) && aligned(p.out, p.out_stride, p.queries);
}

void attention(const TensorView& q, const TensorView& k, const TensorView& v,
               const OptionalView& bias, double scale, const TensorView& out, Stream stream) {
  check_attention(q, k, v, bias, out);
  if (q.numel() == 0) return;
  const AttentionParams params = attention_params(q, k, v, bias, scale, out);
  if (q.device == Device::kCUDA) {
    ACCELRT_CHECK(
        attention_cuda_takes(params), kOp,
        ": the CUDA kernel takes bfloat16 and float16, a head dim that is a multiple of 8 "
        "and q, k, v and out aligned to 16 bytes; these are ",
        name_of(q.dtype), " with head dim ", params.head_dim,
        params.head_dim % 8 == 0 ? ", or not aligned" : "");
    ACCELRT_CALL_CUDA(launch_attention, params, stream);
    return;
  }
  ACCELRT_CALL_CPU_TILES(attention_cpu, params);
}

}  // namespace accelrt
