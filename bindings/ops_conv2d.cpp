#include <torch/csrc/stable/ops.h>

#include "kernels/conv2d/conv2d.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

void conv2d_op(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               int64_t stride_height, int64_t stride_width, int64_t padding_height,
               int64_t padding_width, const Tensor& out) {
  conv2d(view_of(x), view_of(weight), view_of(bias),
         {stride_height, stride_width, padding_height, padding_width}, view_of(out));
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&accelrt::bindings::conv2d_op));
}
