// Products by our own kernels, for a program without another library. Nothing is allocated on the
// device and nothing waits for it. On CUDA a call that its kernel does not take throws (see
// linear_cuda_takes and attention_cuda_takes).
#pragma once

#include "blocks/products.h"
#include "kernels/attention/attention.h"

namespace accelrt {

class KernelProducts : public Products {
 public:
  void linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
              const Epilogue& epilogue, const TensorView& out, Stream stream) override {
    accelrt::linear(x, weight, bias, epilogue.kind, epilogue.gate, epilogue.rows_per_sample, out,
                    stream);
  }

  void attention(const TensorView& q, const TensorView& k, const TensorView& v,
                 const OptionalView& bias, double scale, const TensorView& out,
                 Stream stream) override {
    accelrt::attention(q, k, v, bias, scale, out, stream);
  }
};

}  // namespace accelrt
