#include <algorithm>

#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"
#include "kernels/temporal_attention/temporal_attention.cuh"

namespace accelrt {
namespace {

bool rows_aligned(const void* pointer, const FrameStrides& stride, int64_t lanes) {
  return aligned_to(pointer, 16) && stride.batch % lanes == 0 && stride.frame % lanes == 0 &&
         stride.pixel % lanes == 0;
}

template <typename T, int kFrames>
void launch_one(const TemporalAttentionParams& p, Stream stream) {
  using Traits = TemporalAttentionTraits<T, kFrames>;
  constexpr int64_t kLanes = Traits::kVec;
  TemporalAttentionLaunch arguments;
  arguments.p = p;
  // Chunks of about equal length, so that the last one is not a remnant.
  const int chunks = (p.head_dim + Traits::kMaxChunk - 1) / Traits::kMaxChunk;
  const int even = (p.head_dim + chunks - 1) / chunks;
  arguments.chunk = (even + 7) / 8 * 8;
  arguments.wide = p.head_dim % kLanes == 0 && rows_aligned(p.q, p.q_stride, kLanes) &&
                   rows_aligned(p.k, p.k_stride, kLanes) && rows_aligned(p.v, p.v_stride, kLanes) &&
                   rows_aligned(p.out, p.out_stride, kLanes);
  const int64_t units = p.batch * p.pixels * p.heads;
  LaunchConfig config;
  config.grid_x = (units + Traits::kUnits - 1) / Traits::kUnits;
  config.threads = Traits::kThreads;
  config.shared_bytes = Traits::kSharedBytes;
  launch<temporal_attention_kernel<Traits>>("temporal_attention", config, stream, arguments);
}

}  // namespace

void launch_temporal_attention(const TemporalAttentionParams& p, Stream stream) {
  dispatch_dtype("temporal_attention", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int frames = std::max(p.frames, p.key_frames);
    if (frames <= 16) {
      launch_one<T, 16>(p, stream);
    } else if (frames <= 32) {
      launch_one<T, 32>(p, stream);
    } else {
      launch_one<T, 64>(p, stream);
    }
  });
}

}  // namespace accelrt
