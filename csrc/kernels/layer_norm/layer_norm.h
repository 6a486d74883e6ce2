// LayerNorm over the last dimension with modulation, alone and after a gated residual sum:
//
//   layer_norm_modulate:                r = x
//   gate_residual_layer_norm_modulate:  r = residual + gate * x + inject_scale * inject
//   both:                               out = (LN(r) * weight + bias) * (1 + scale) + shift
//
// x, residual, inject, out, residual_out: [B, S, D], the last stride one, the others free.
// gate, scale, shift: [B, D], the batch stride free. weight, bias, inject_scale: [D].
// Any output may be any of the [B, S, D] inputs: a row is read before it is written.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

struct LayerNormParams {
  struct Rows {  // [B, S, D]
    void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t row_stride = 0;
  };
  struct PerSample {  // [B, D]; null: zeros (of a gate: ones)
    const void* data = nullptr;
    int64_t batch_stride = 0;
  };
  int64_t batch = 0;
  int64_t rows = 0;  // of one sample
  int64_t width = 0;
  Rows x;
  Rows residual;  // null for the plain form
  Rows inject;    // may be null
  Rows out;
  Rows residual_out;  // null for the plain form
  PerSample gate;
  PerSample scale;
  PerSample shift;
  const void* weight = nullptr;        // null: ones
  const void* bias = nullptr;          // null: zeros
  const void* inject_scale = nullptr;  // null: ones
  float eps = 1e-5f;
  DType dtype = DType::kFloat32;
};

void layer_norm_modulate(const TensorView& x, const OptionalView& weight, const OptionalView& bias,
                         const OptionalView& scale, const OptionalView& shift, double eps,
                         const TensorView& out, Stream stream = nullptr);

void gate_residual_layer_norm_modulate(const TensorView& x, const TensorView& residual,
                                       const OptionalView& gate, const OptionalView& weight,
                                       const OptionalView& bias, const OptionalView& scale,
                                       const OptionalView& shift, const OptionalView& inject,
                                       const OptionalView& inject_scale, double eps,
                                       const TensorView& out, const TensorView& residual_out,
                                       Stream stream = nullptr);

ACCELRT_DECLARE_CPU(layer_norm_cpu, LayerNormParams)
ACCELRT_DECLARE_CPU_BF16(layer_norm_cpu, LayerNormParams)
void launch_layer_norm(const LayerNormParams& params, Stream stream);

}  // namespace accelrt
