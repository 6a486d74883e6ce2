#include <torch/csrc/stable/ops.h>

#include "aten_products.h"
#include "kernels/linear/linear.h"
#include "tensor_args.h"

namespace accelrt::bindings {
namespace {

void linear_cpu_op(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   int64_t epilogue, const OptionalTensor& gate, int64_t rows_per_sample,
                   const Tensor& out) {
  linear(view_of(x), view_of(weight), view_of(bias), static_cast<LinearEpilogue>(epilogue),
         view_of(gate), rows_per_sample, view_of(out));
}

// cuBLASLt, unless our kernel was asked for and takes the call.
void linear_cuda_op(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    int64_t epilogue, const OptionalTensor& gate, int64_t rows_per_sample,
                    const Tensor& out) {
  const DeviceScope scope(x);
  const auto kind = static_cast<LinearEpilogue>(epilogue);
  if (own_cuda_linear(view_of(x), view_of(weight), view_of(bias), kind, view_of(gate),
                      rows_per_sample, view_of(out), scope.stream())) {
    return;
  }
  Epilogue what;
  what.kind = kind;
  what.gate = view_of(gate);
  what.rows_per_sample = rows_per_sample;
  const Tensor scratch = torch::stable::new_empty(out, {out.size(0), weight.size(0)});
  what.scratch = view_of(scratch);
  AtenProducts(x).linear(view_of(x), view_of(weight), view_of(bias), what, view_of(out),
                         scope.stream());
}

}  // namespace
}  // namespace accelrt::bindings

STABLE_TORCH_LIBRARY_IMPL(accelrt, CPU, m) {
  m.impl("linear", TORCH_BOX(&accelrt::bindings::linear_cpu_op));
}

STABLE_TORCH_LIBRARY_IMPL(accelrt, CUDA, m) {
  m.impl("linear", TORCH_BOX(&accelrt::bindings::linear_cuda_op));
}
