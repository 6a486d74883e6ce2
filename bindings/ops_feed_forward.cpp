#include "aten_products.h"
#include "blocks/feed_forward.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

// The slices are as long as the scratch allows.
void feed_forward_op(const Tensor& x, const Tensor& in_weight, const OptionalTensor& in_bias,
                     const Tensor& out_weight, const OptionalTensor& out_bias, int64_t activation,
                     const OptionalTensor& gate, int64_t rows_per_sample, bool add,
                     const Tensor& out, const Tensor& scratch) {
  const DeviceScope scope(x);
  FeedForwardParams p;
  p.x = view_of(x);
  p.layers.in = {view_of(in_weight), view_of(in_bias)};
  p.layers.out = {view_of(out_weight), view_of(out_bias)};
  p.layers.activation = static_cast<HiddenActivation>(activation);
  p.add = add;
  p.gate = view_of(gate);
  p.rows_per_sample = rows_per_sample;
  p.out = view_of(out);
  check(p);
  if (out.numel() == 0) return;
  const TensorView memory = view_of(scratch);
  check_same_type("feed_forward", "scratch", memory, p.x);
  p.scratch = memory.data;
  p.scratch_bytes = memory.numel() * size_of(memory.dtype);
  p.layers.rows = feed_forward_rows(p, p.scratch_bytes);
  ACCELRT_CHECK(p.layers.rows > 0, "feed_forward: the scratch has ", p.scratch_bytes,
                " bytes, too few for the hidden activations of one row");
  FastestProducts products(x);
  feed_forward(p, products, scope.stream());
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("feed_forward", TORCH_BOX(&accelrt::bindings::feed_forward_op));
}

STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("feed_forward", TORCH_BOX(&accelrt::bindings::feed_forward_op));
}
