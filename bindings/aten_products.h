// Products and attention by torch's own operators: cuBLASLt and its flash kernels on CUDA, oneDNN
// on the CPU.
#pragma once

#include "blocks/products.h"
#include "tensor_args.h"

namespace accelrt::bindings {

class AtenProducts : public Products {
 public:
  // like: on the device of everything that will come.
  explicit AtenProducts(const Tensor& like) : device_(like.device()), dtype_(like.scalar_type()) {}

  void linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
              const Epilogue& epilogue, const TensorView& out, Stream stream) override;
  void attention(const TensorView& q, const TensorView& k, const TensorView& v,
                 const OptionalView& bias, double scale, const TensorView& out,
                 Stream stream) override;

 private:
  Tensor tensor_of(const TensorView& view) const;
  OptionalTensor tensor_of(const OptionalView& view) const;
  void plain_linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                    const TensorView& out) const;

  torch::stable::Device device_;
  torch::headeronly::ScalarType dtype_;
};

// Whether our product of rows with `depth` elements, or our attention over heads with `head_dim`
// channels, is ahead of torch's on this processor.
bool own_linear_is_faster(DType dtype, int64_t depth);
bool own_conv_is_faster(DType dtype);
bool own_attention_is_faster(DType dtype, int64_t head_dim);

// A product on CUDA by our kernel, if own_cuda_products() and it takes the call. False: nothing was
// done.
bool own_cuda_linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                     LinearEpilogue epilogue, const OptionalView& gate, int64_t rows_per_sample,
                     const TensorView& out, Stream stream);

// Attention on CUDA by our kernel, if own_cuda_products() and it takes the call. False: nothing was
// done. The tensors are checked.
bool own_cuda_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                        const OptionalView& bias, double scale, const TensorView& out,
                        Stream stream);

// On the CPU our kernels where they are ahead of torch's, on CUDA where ACCELRT_CUDA_PRODUCTS asks
// for them; torch's operators otherwise.
class FastestProducts : public AtenProducts {
 public:
  explicit FastestProducts(const Tensor& like) : AtenProducts(like) {}

  void linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
              const Epilogue& epilogue, const TensorView& out, Stream stream) override;
  void attention(const TensorView& q, const TensorView& k, const TensorView& v,
                 const OptionalView& bias, double scale, const TensorView& out,
                 Stream stream) override;
};

}  // namespace accelrt::bindings
