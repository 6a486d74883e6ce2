#include "kernels/linear/linear.h"

#include "accelrt/backend.h"

namespace accelrt {
namespace {

constexpr const char* kOp = "linear";

void check_matrix(const char* name, const TensorView& t, const TensorView& x, int64_t rows,
                  int64_t columns) {
  check_same_type(kOp, name, t, x);
  ACCELRT_CHECK(t.ndim == 2 && t.size[0] == rows && t.size[1] == columns, kOp, ": ", name,
                " is not of shape [", rows, ", ", columns, "]");
  check_unit_stride(kOp, name, t);
}

}  // namespace

LinearParams linear_params(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                           LinearEpilogue epilogue, const OptionalView& gate,
                           int64_t rows_per_sample, const TensorView& out) {
  ACCELRT_CHECK(x.ndim == 2 && weight.ndim == 2, kOp, ": x has ", x.ndim, " and weight ",
                weight.ndim, " dimensions, expected 2");
  const int64_t rows = x.size[0];
  const int64_t weight_rows = weight.size[0];
  ACCELRT_CHECK(!is_geglu(epilogue) || weight_rows % 2 == 0, kOp, ": weight has ", weight_rows,
                " rows; geglu needs an even number");
  const int64_t columns = is_geglu(epilogue) ? weight_rows / 2 : weight_rows;
  check_matrix("x", x, x, rows, x.size[1]);
  check_matrix("weight", weight, x, weight_rows, x.size[1]);
  check_matrix("out", out, x, rows, columns);
  if (bias) {
    check_same_type(kOp, "bias", *bias, x);
    ACCELRT_CHECK(bias->ndim == 1 && bias->size[0] == weight_rows, kOp, ": bias is not of shape [",
                  weight_rows, "]");
    check_unit_stride(kOp, "bias", *bias);
  }
  ACCELRT_CHECK(!gate || epilogue == LinearEpilogue::kGatedResidual, kOp,
                ": a gate without a residual");
  if (gate) {
    ACCELRT_CHECK(rows_per_sample >= 1 && rows % rows_per_sample == 0, kOp, ": ", rows_per_sample,
                  " rows per sample do not divide the ", rows, " rows");
    check_matrix("gate", *gate, x, rows / rows_per_sample, columns);
  }

  LinearParams p;
  p.x = x.data;
  p.weight = weight.data;
  p.bias = data_or_null(bias);
  p.out = out.data;
  p.x_stride = x.stride[0];
  p.weight_stride = weight.stride[0];
  p.out_stride = out.stride[0];
  p.rows = rows;
  p.columns = columns;
  p.depth = x.size[1];
  p.epilogue = epilogue;
  p.gate = data_or_null(gate);
  p.gate_stride = gate ? gate->stride[0] : 0;
  p.rows_per_sample = rows_per_sample;
  p.dtype = x.dtype;
  return p;
}

bool linear_cuda_takes(const LinearParams& p) {
  constexpr int64_t kMost = int64_t{1} << 30;  // the kernel counts rows and tiles in 32 bits
  const auto aligned = [](const void* pointer, int64_t stride, int64_t rows) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && (rows <= 1 || stride % 8 == 0);
  };
  const int64_t weight_rows = is_geglu(p.epilogue) ? 2 * p.columns : p.columns;
  const bool rows_aligned = p.depth == 0 || (aligned(p.x, p.x_stride, p.rows) &&
                                             aligned(p.weight, p.weight_stride, weight_rows));
  return size_of(p.dtype) == 2 && p.depth % 8 == 0 && p.depth <= kMost && p.rows <= kMost &&
         weight_rows <= kMost && rows_aligned;
}

void linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
            LinearEpilogue epilogue, const OptionalView& gate, int64_t rows_per_sample,
            const TensorView& out, Stream stream) {
  const LinearParams p = linear_params(x, weight, bias, epilogue, gate, rows_per_sample, out);
  if (p.rows == 0 || p.columns == 0) return;
  if (x.device == Device::kCUDA) {
    ACCELRT_CHECK(linear_cuda_takes(p), kOp, ": the CUDA kernel has no ", name_of(p.dtype), " [",
                  p.rows, ", ", p.depth, "] by [", weight.size[0], ", ", p.depth,
                  "] with row strides ", p.x_stride, " and ", p.weight_stride,
                  "; it takes bfloat16 and float16 with a depth that is a multiple of 8 and rows "
                  "aligned to 16 bytes");
    ACCELRT_CALL_CUDA(launch_linear, p, stream);
    return;
  }
  ACCELRT_CALL_CPU_TILES(linear_cpu, p);
}

}  // namespace accelrt
