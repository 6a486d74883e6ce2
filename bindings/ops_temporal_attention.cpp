#include "kernels/temporal_attention/temporal_attention.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

void temporal_attention_op(const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_heads,
                           double scale, const Tensor& out) {
  const DeviceScope scope(q);
  temporal_attention(view_of(q), view_of(k), view_of(v), num_heads, static_cast<float>(scale),
                     view_of(out), scope.stream());
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("temporal_attention", TORCH_BOX(&accelrt::bindings::temporal_attention_op));
}

STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("temporal_attention", TORCH_BOX(&accelrt::bindings::temporal_attention_op));
}
