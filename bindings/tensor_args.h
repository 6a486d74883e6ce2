// torch::stable::Tensor -> accelrt::TensorView, the device guard, and the current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "accelrt/tensor_view.h"

namespace accelrt::bindings {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

TensorView view_of(const Tensor& tensor);
OptionalView view_of(const OptionalTensor& tensor);

// Makes the tensor's device current and holds torch's current stream on it.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor);
  Stream stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Stream stream_ = nullptr;
};

}  // namespace accelrt::bindings
