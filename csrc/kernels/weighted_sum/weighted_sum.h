// out[b] = base[b] + sum over k of weights[b, k] * features[k, b], in float, rounded once.
// features: [K, B, ...]; weights: float32 [B, K]; base, out: [B, ...]; all contiguous. A slot
// whose weight is zero is not read. out may be base, or a slot of features.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/strided.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

constexpr int kWeightedSumMaxSlots = 16;

struct WeightedSumParams {
  StridedRows<1> rows;  // B rows of M elements: a slot, base, out
  int slots = 0;
  const void* features = nullptr;  // [K, B, M]
  const float* weights = nullptr;  // [B, K]
  const void* base = nullptr;      // [B, M], may be null
  void* out = nullptr;             // [B, M]
  int64_t blocks = 1;              // CUDA: blocks per row
  DType dtype = DType::kFloat32;
};

void weighted_sum(const TensorView& features, const TensorView& weights, const OptionalView& base,
                  const TensorView& out, Stream stream = nullptr);

ACCELRT_DECLARE_CPU(weighted_sum_cpu, WeightedSumParams)
void launch_weighted_sum(const WeightedSumParams& params, Stream stream);

}  // namespace accelrt
