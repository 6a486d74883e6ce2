#include <torch/csrc/stable/ops.h>

#include <array>

#include "aten_products.h"
#include "kernels/attention/attention.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

void attention_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
                  double scale, const Tensor& out) {
  attention(view_of(q), view_of(k), view_of(v), view_of(bias), scale, view_of(out));
}

#if defined(ACCELRT_HAVE_CUDA)
// Unless ACCELRT_CUDA_PRODUCTS asks for ours, the library's scaled dot-product attention is the
// kernel on a GPU: it chooses among flash, cuDNN and memory-efficient ones and takes the views as
// they are. Its result is copied to out.
void attention_cuda_op(const Tensor& q, const Tensor& k, const Tensor& v,
                       const OptionalTensor& bias, double scale, const Tensor& out) {
  check_attention(view_of(q), view_of(k), view_of(v), view_of(bias), view_of(out));
  if (q.numel() == 0) return;
  const DeviceScope scope(q);
  if (own_cuda_attention(view_of(q), view_of(k), view_of(v), view_of(bias), scale, view_of(out),
                         scope.stream())) {
    return;
  }
  const auto heads_first = [](const Tensor& t) { return torch::stable::transpose(t, 1, 2); };
  using torch::stable::detail::from;
  std::array<StableIValue, 8> stack{from(heads_first(q)),
                                    from(heads_first(k)),
                                    from(heads_first(v)),
                                    from(bias),
                                    from(0.0),                           // dropout
                                    from(false),                         // causal
                                    from(std::optional<double>(scale)),  //
                                    from(false)};                        // grouped queries
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::scaled_dot_product_attention", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  Tensor target = out;
  torch::stable::copy_(target, heads_first(torch::stable::detail::to<Tensor>(stack[0])));
}
#endif

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("attention", TORCH_BOX(&accelrt::bindings::attention_op));
}

#if defined(ACCELRT_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("attention", TORCH_BOX(&accelrt::bindings::attention_cuda_op));
}
#endif
