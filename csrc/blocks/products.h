// The two operators of a block that a library may do better than our kernels: the product of rows
// with a weight matrix, and attention. A block calls them through this interface, so that a host
// program can supply its own.
#pragma once

#include "accelrt/tensor_view.h"
#include "kernels/linear/linear.h"

namespace accelrt {

// What happens to y = x weight^T + bias before it is rounded to out.
struct Epilogue {
  LinearEpilogue kind = LinearEpilogue::kNone;
  // Of kGatedResidual: out += gate * y. gate: [B, N], null: ones; one row for every
  // `rows_per_sample` rows of out.
  OptionalView gate;
  int64_t rows_per_sample = 1;
  // Of kGatedResidual and the GEGLUs: memory for y, contiguous [M, rows of the weight], that may
  // be left unused. With a GEGLU out may be its first columns.
  TensorView scratch;
};

class Products {
 public:
  virtual ~Products() = default;

  // out = epilogue(x weight^T + bias). x: [M, K], weight: [N, K], bias: [N], out: [M, N] (weight
  // and bias [2 N, ..] with a GEGLU); the last strides are one, the row strides free. out overlaps
  // no input.
  virtual void linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                      const Epilogue& epilogue, const TensorView& out, Stream stream) = 0;

  // out = softmax(scale q k^T + bias) v. q, out: [B, S, H, D], k, v: [B, L, H, D], the last strides
  // one; bias: [B or 1, H or 1, S or 1, L]. out may be q, and overlaps no other input.
  virtual void attention(const TensorView& q, const TensorView& k, const TensorView& v,
                         const OptionalView& bias, double scale, const TensorView& out,
                         Stream stream) = 0;
};

}  // namespace accelrt
