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

void linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
            LinearEpilogue epilogue, const OptionalView& gate, int64_t rows_per_sample,
            const TensorView& out) {
  ACCELRT_CHECK(x.device == Device::kCPU, kOp, ": x is not on the CPU");
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
  if (out.numel() == 0) return;

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
  ACCELRT_CALL_CPU_TILES(linear_cpu, p);
}

}  // namespace accelrt
