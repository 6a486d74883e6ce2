#include "kernels/attention/attention.cuh"
#include "runtime/device_info.h"

namespace accelrt {
namespace {

constexpr const char* kOp = "attention";

template <typename T, int kDim>
void launch_one(const AttentionLaunch& arguments, Stream stream) {
  using Traits = AttentionTraits<T, kDim>;
  const AttentionParams& p = arguments.p;
  const int64_t heads = p.batch * p.heads;
  const auto blocks = [&](int warps) {
    const int64_t queries = int64_t{warps} * Traits::kQueries;
    return heads * ((p.queries + queries - 1) / queries);
  };
  // Large blocks read keys and values less often, but none of them is idle, and as long as there
  // are fewer of them than multiprocessors, smaller ones are better.
  int warps = Traits::kMaxWarps;
  const int enough = current_device_info().multiprocessors;
  while (warps > 1 && (blocks(warps / 2) == blocks(warps) || blocks(warps) < enough)) warps /= 2;
  LaunchConfig config;
  config.grid_x = blocks(warps);
  config.threads = warps * kWarpSize;
  config.shared_bytes = Traits::shared_bytes(warps);
  launch<attention_kernel<Traits>>(kOp, config, stream, arguments);
}

// The head dims of models have an instance each; the others take the next one.
template <typename T>
void launch_dim(const AttentionLaunch& arguments, Stream stream) {
  const int dim = arguments.p.head_dim;
  if (dim <= 40) return launch_one<T, 40>(arguments, stream);
  if (dim <= 64) return launch_one<T, 64>(arguments, stream);
  if (dim <= 72) return launch_one<T, 72>(arguments, stream);
  if (dim <= 80) return launch_one<T, 80>(arguments, stream);
  if (dim <= 96) return launch_one<T, 96>(arguments, stream);
  if (dim <= 128) return launch_one<T, 128>(arguments, stream);
  if (dim <= 160) return launch_one<T, 160>(arguments, stream);
  launch_one<T, 256>(arguments, stream);
}

}  // namespace

void launch_attention(const AttentionParams& p, Stream stream) {
  AttentionLaunch arguments;
  arguments.p = p;
  arguments.factor = static_cast<float>(p.scale * kLog2E);
  const bool even_bias = p.keys % 2 == 0 && reinterpret_cast<uintptr_t>(p.bias) % 4 == 0;
  const TokenStrides& stride = p.bias_stride;
  arguments.bias_pairs =
      even_bias && stride.batch % 2 == 0 && stride.token % 2 == 0 && stride.head % 2 == 0;
  if (p.dtype == DType::kBFloat16) {
    launch_dim<bfloat16>(arguments, stream);
  } else {
    ACCELRT_CHECK(p.dtype == DType::kFloat16, kOp, ": the CUDA kernel has no ", name_of(p.dtype));
    launch_dim<float16>(arguments, stream);
  }
}

}  // namespace accelrt
