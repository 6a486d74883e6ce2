// out = epilogue(x weight^T + bias), a product of rows with a weight matrix.
//
// x: [M, K], weight: [N, K], bias: [N], out: [M, N]; the last strides one, the row strides free.
// With a GEGLU weight and bias have 2 N rows: the values, then the gates.
// out overlaps no input. Sums are in float32 and rounded once, after the epilogue.
// Memory beside, on the CPU: a panel of the weights per thread, 32 rows of K (twice the size of
// bfloat16 where the processor has no products of it, and then 4 MiB of the rows of x, or twelve of
// them). With tile registers the threads share either the rows of x, up to kLinearRowsBytes, or
// packed weights, kLinearPackBytes at most (unless a panel of 32 rows is larger); each has up to
// eight panels or 1.25 MiB of the rows of x (256 of them at least, all of up to 512), and below
// 512 KiB of sums. On CUDA none; linear_cuda_takes says what its kernel computes, a library has the
// rest.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

constexpr int64_t kLinearRowsBytes = int64_t{8} << 20;
constexpr int64_t kLinearPackBytes = int64_t{16} << 20;

enum class LinearEpilogue : int {
  kNone = 0,
  kGELU = 1,
  kGELUTanh = 2,
  kGatedResidual = 3,  // out += gate * y
  kGEGLU = 4,          // out = value * gelu(gate)
  kGEGLUTanh = 5,
};

constexpr bool is_geglu(LinearEpilogue kind) {
  return kind == LinearEpilogue::kGEGLU || kind == LinearEpilogue::kGEGLUTanh;
}

struct LinearParams {
  const void* x = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;  // null: zeros
  void* out = nullptr;
  int64_t x_stride = 0;  // between rows
  int64_t weight_stride = 0;
  int64_t out_stride = 0;
  int64_t rows = 0;     // M
  int64_t columns = 0;  // N, of out
  int64_t depth = 0;    // K
  LinearEpilogue epilogue = LinearEpilogue::kNone;
  const void* gate = nullptr;  // [M / rows_per_sample, N]; null: ones
  int64_t gate_stride = 0;     // between samples
  int64_t rows_per_sample = 1;
  DType dtype = DType::kFloat32;
};

// Throws unless the tensors are as above.
LinearParams linear_params(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                           LinearEpilogue epilogue, const OptionalView& gate,
                           int64_t rows_per_sample, const TensorView& out);

// Whether the CUDA kernel computes it: bfloat16 and float16, K a multiple of 8, the rows of x and
// of the weights aligned to 16 bytes. out, bias and gate may lie anywhere.
bool linear_cuda_takes(const LinearParams& params);

// Throws on CUDA if the kernel does not take it.
void linear(const TensorView& x, const TensorView& weight, const OptionalView& bias,
            LinearEpilogue epilogue, const OptionalView& gate, int64_t rows_per_sample,
            const TensorView& out, Stream stream = nullptr);

ACCELRT_DECLARE_CPU(linear_cpu, LinearParams)
ACCELRT_DECLARE_CPU_BF16(linear_cpu, LinearParams)
ACCELRT_DECLARE_CPU_TILES(linear_cpu, LinearParams)
void launch_linear(const LinearParams& params, Stream stream);

}  // namespace accelrt
