#include "aten_products.h"
#include "blocks/transformer_block.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

LinearWeights linear_of(const Tensor& weight, const OptionalTensor& bias) {
  return {view_of(weight), view_of(bias)};
}

std::optional<LinearWeights> linear_of(const OptionalTensor& weight, const OptionalTensor& bias) {
  if (!weight) return std::nullopt;
  return linear_of(*weight, bias);
}

const Tensor& required(const char* name, const OptionalTensor& tensor) {
  ACCELRT_CHECK(tensor.has_value(), "transformer_block: cross-attention without ", name);
  return *tensor;
}

void transformer_block_op(
    const Tensor& stream, const Tensor& modulation, const OptionalTensor& norm1_weight,
    const OptionalTensor& norm1_bias, double norm1_eps, const OptionalTensor& norm2_weight,
    const OptionalTensor& norm2_bias, double norm2_eps, const Tensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_weight, const OptionalTensor& k_bias,
    const OptionalTensor& v_weight, const OptionalTensor& v_bias, const Tensor& out_weight,
    const OptionalTensor& out_bias, int64_t heads, double scale, const OptionalTensor& mask,
    int64_t heads_per_slice, const OptionalTensor& cross_q_weight,
    const OptionalTensor& cross_q_bias, const OptionalTensor& cross_k_weight,
    const OptionalTensor& cross_k_bias, const OptionalTensor& cross_v_weight,
    const OptionalTensor& cross_v_bias, const OptionalTensor& cross_out_weight,
    const OptionalTensor& cross_out_bias, int64_t cross_heads, double cross_scale,
    const OptionalTensor& cross_mask, const OptionalTensor& context, const OptionalTensor& keys,
    const OptionalTensor& values, const Tensor& ff_in_weight, const OptionalTensor& ff_in_bias,
    const Tensor& ff_out_weight, const OptionalTensor& ff_out_bias, int64_t activation,
    int64_t ff_rows, const Tensor& workspace) {
  const DeviceScope scope(stream);
  TransformerBlockParams p;
  p.stream = view_of(stream);
  p.modulation = view_of(modulation);
  p.norm1 = {view_of(norm1_weight), view_of(norm1_bias), norm1_eps};
  p.norm2 = {view_of(norm2_weight), view_of(norm2_bias), norm2_eps};
  p.attention.q = linear_of(q_weight, q_bias);
  p.attention.k = linear_of(k_weight, k_bias);
  p.attention.v = linear_of(v_weight, v_bias);
  p.attention.out = linear_of(out_weight, out_bias);
  p.attention.heads = heads;
  p.attention.scale = scale;
  p.attention.mask = view_of(mask);
  p.heads_per_slice = heads_per_slice;
  if (cross_q_weight) {
    CrossAttention& cross = p.cross.emplace();
    cross.weights.q = linear_of(*cross_q_weight, cross_q_bias);
    cross.weights.k = linear_of(cross_k_weight, cross_k_bias);
    cross.weights.v = linear_of(cross_v_weight, cross_v_bias);
    cross.weights.out = linear_of(required("cross_out_weight", cross_out_weight), cross_out_bias);
    cross.weights.heads = cross_heads;
    cross.weights.scale = cross_scale;
    cross.weights.mask = view_of(cross_mask);
    cross.context = view_of(context);
    cross.keys = view_of(keys);
    cross.values = view_of(values);
  }
  p.feed_forward.in = linear_of(ff_in_weight, ff_in_bias);
  p.feed_forward.out = linear_of(ff_out_weight, ff_out_bias);
  p.feed_forward.activation = static_cast<HiddenActivation>(activation);
  p.feed_forward.rows = ff_rows;
  const TensorView memory = view_of(workspace);
  check_same_type("transformer_block", "workspace", memory, p.stream);
  p.workspace = memory.data;
  p.workspace_bytes = memory.numel() * size_of(memory.dtype);
  FastestProducts products(stream);
  transformer_block(p, products, scope.stream());
}

// x weight^T + bias by the products that a block would take. x: [M, K], out: [M, N].
void block_projection_op(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const Tensor& out) {
  const DeviceScope scope(x);
  FastestProducts(x).linear(view_of(x), view_of(weight), view_of(bias), Epilogue{}, view_of(out),
                            scope.stream());
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("transformer_block", TORCH_BOX(&accelrt::bindings::transformer_block_op));
  m.impl("block_projection", TORCH_BOX(&accelrt::bindings::block_projection_op));
}

STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("transformer_block", TORCH_BOX(&accelrt::bindings::transformer_block_op));
  m.impl("block_projection", TORCH_BOX(&accelrt::bindings::block_projection_op));
}
