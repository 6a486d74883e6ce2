#include "tensor_args.h"

// Lives in torch's CUDA library: weak, so that this object also loads under CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace accelrt::bindings {
namespace {

DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  ACCELRT_CHECK(false, "unsupported dtype (torch scalar type ",
                static_cast<int>(tensor.scalar_type()), "); supported: float32, bfloat16, float16");
}

}  // namespace

TensorView view_of(const Tensor& tensor) {
  TensorView view;
  ACCELRT_CHECK(tensor.dim() <= kMaxDims, "a tensor has ", tensor.dim(), " dimensions; at most ",
                kMaxDims, " are supported");
  ACCELRT_CHECK(tensor.is_cpu() || tensor.is_cuda(), "tensors must be on a CPU or CUDA device");
  view.data = tensor.data_ptr();
  view.dtype = dtype_of(tensor);
  view.device = tensor.is_cuda() ? Device::kCUDA : Device::kCPU;
  view.ndim = static_cast<int>(tensor.dim());
  for (int i = 0; i < view.ndim; ++i) {
    view.size[i] = tensor.size(i);
    view.stride[i] = tensor.stride(i);
  }
  return view;
}

OptionalView view_of(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return view_of(*tensor);
}

DeviceScope::DeviceScope(const Tensor& tensor) {
  if (!tensor.is_cuda()) return;
  const auto index = tensor.get_device_index();
  guard_.emplace(index);
  ACCELRT_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                "a CUDA tensor was given, but torch's CUDA library is not loaded");
  const auto status = aoti_torch_get_current_cuda_stream(index, &stream_);
  ACCELRT_CHECK(status == AOTI_TORCH_SUCCESS, "torch has no current CUDA stream on device ", index);
}

}  // namespace accelrt::bindings
