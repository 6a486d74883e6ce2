// out[b] = |a[b] - b[b]|_p / |b[b]|_p, p = 1 or 2. a, b: [B, ...], any strides; out: float32 [B].
#pragma once

#include <algorithm>

#include "accelrt/cpu_isa.h"
#include "accelrt/strided.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

struct FeatureDeltaParams {
  StridedRows<2> rows;  // a, b; the first dimension is the sample
  int64_t batch = 0;
  int64_t rows_per_sample = 0;
  const void* a = nullptr;
  const void* b = nullptr;
  float* out = nullptr;
  int64_t out_stride = 1;
  float* workspace = nullptr;  // CUDA: [batch, blocks, 2] partial sums
  int64_t blocks = 1;          // CUDA: blocks per sample
  int p = 1;
  DType dtype = DType::kFloat32;
};

// CUDA blocks that share a sample of `elements`: a function of the shape alone, so that the
// order of the sums is too.
inline int64_t feature_delta_blocks(int64_t batch, int64_t elements) {
  constexpr int64_t kElementsPerBlock = 4096;
  constexpr int64_t kMaxBlocks = 132 * 8;  // fills the largest chips
  const int64_t wanted = (elements + kElementsPerBlock - 1) / kElementsPerBlock;
  const int64_t most = std::max<int64_t>(1, kMaxBlocks / std::max<int64_t>(1, batch));
  return std::clamp<int64_t>(wanted, 1, most);
}

// Floats of workspace that the CUDA kernels need for `a`.
inline int64_t feature_delta_workspace(const TensorView& a) {
  const int64_t batch = a.size[0];
  return batch == 0 ? 0 : 2 * batch * feature_delta_blocks(batch, a.numel() / batch);
}

// workspace: float32, contiguous, feature_delta_workspace(a) elements; CUDA only.
void feature_delta(const TensorView& a, const TensorView& b, int p, const OptionalView& workspace,
                   const TensorView& out, Stream stream = nullptr);

ACCELRT_DECLARE_CPU(feature_delta_cpu, FeatureDeltaParams)
void launch_feature_delta(const FeatureDeltaParams& params, Stream stream);

}  // namespace accelrt
