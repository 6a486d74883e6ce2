#include <algorithm>

#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"
#include "kernels/temporal_attention/temporal_attention.cuh"
#include "kernels/temporal_attention/temporal_attention_tiles.cuh"

namespace accelrt {
namespace {

constexpr const char* kOp = "temporal_attention";

// All tensors can be accessed 16 bytes, `lanes` elements, at a time.
bool in_chunks(const TemporalAttentionParams& p, int64_t lanes) {
  const auto aligned = [&](const void* pointer, const FrameStrides& stride) {
    return aligned_to(pointer, 16) && stride.batch % lanes == 0 && stride.frame % lanes == 0 &&
           stride.pixel % lanes == 0;
  };
  return p.head_dim % lanes == 0 && aligned(p.q, p.q_stride) && aligned(p.k, p.k_stride) &&
         aligned(p.v, p.v_stride) && aligned(p.out, p.out_stride);
}

template <typename T, int kKeys>
void launch_tiles(const TemporalAttentionParams& p, Stream stream) {
  using Traits = TemporalTilesTraits<T, kKeys>;
  TemporalTilesLaunch arguments;
  arguments.p = p;
  arguments.query_rows = (p.frames + 15) / 16 * 16;
  arguments.row = (p.head_dim / Traits::kLanes | 1) * Traits::kLanes;
  const int64_t warp_bytes =
      int64_t{arguments.query_rows + 2 * kKeys} * arguments.row * static_cast<int64_t>(sizeof(T));
  const int64_t warps = std::clamp<int64_t>(Traits::kWarpsShare / warp_bytes, 1, Traits::kMaxWarps);
  const int64_t units = p.batch * p.pixels * p.heads;
  LaunchConfig config;
  config.grid_x = (units + warps - 1) / warps;
  config.threads = static_cast<int>(warps) * kWarpSize;
  config.shared_bytes = warps * warp_bytes;
  launch<temporal_attention_tiles_kernel<Traits>>(kOp, config, stream, arguments);
}

template <typename T>
void launch_tiles(const TemporalAttentionParams& p, Stream stream) {
  if (p.key_frames <= 16) return launch_tiles<T, 16>(p, stream);
  if (p.key_frames <= 32) return launch_tiles<T, 32>(p, stream);
  if (p.key_frames <= 48) return launch_tiles<T, 48>(p, stream);
  launch_tiles<T, 64>(p, stream);
}

template <typename T, int kFrames>
void launch_one(const TemporalAttentionParams& p, Stream stream) {
  using Traits = TemporalAttentionTraits<T, kFrames>;
  TemporalAttentionLaunch arguments;
  arguments.p = p;
  // Chunks of about equal length, so that the last one is not a remnant.
  const int chunks = (p.head_dim + Traits::kMaxChunk - 1) / Traits::kMaxChunk;
  const int even = (p.head_dim + chunks - 1) / chunks;
  arguments.chunk = (even + 7) / 8 * 8;
  arguments.wide = in_chunks(p, Traits::kVec);
  const int64_t units = p.batch * p.pixels * p.heads;
  LaunchConfig config;
  config.grid_x = (units + Traits::kUnits - 1) / Traits::kUnits;
  config.threads = Traits::kThreads;
  config.shared_bytes = Traits::kSharedBytes;
  launch<temporal_attention_kernel<Traits>>(kOp, config, stream, arguments);
}

}  // namespace

void launch_temporal_attention(const TemporalAttentionParams& p, Stream stream) {
  dispatch_dtype(kOp, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      if (in_chunks(p, kChunkBytes / sizeof(T))) return launch_tiles<T>(p, stream);
    }
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
