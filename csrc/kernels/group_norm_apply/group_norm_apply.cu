#include "kernels/group_norm_apply/group_norm_apply.cuh"

#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"

namespace accelrt {
namespace {

constexpr const char* kOp = "group_norm_apply";
constexpr int kThreads = 256;

bool multiple(const ImageStrides& s, int64_t lanes) { return s.n % lanes == 0 && s.h % lanes == 0; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
void launch_part(const GroupNormApplyParams& p, int index, Stream stream) {
  constexpr int kVec = 16 / sizeof(T);
  const GroupNormSource& s = p.source;
  const GroupNormPart& part = s.part[index];
  const ImageStrides& from = part.stride;
  const ImageStrides& to = p.out_stride;
  const int64_t pixels = s.pixels();
  const bool aligned = aligned_to(part.data, 16) && aligned_to(p.out, 16) && multiple(from, kVec) &&
                       multiple(to, kVec);
  const bool last = aligned && from.c == 1 && to.c == 1 && part.channels % kVec == 0 &&
                    part.first % kVec == 0 && from.w % kVec == 0 && to.w % kVec == 0;
  const bool planar = aligned && from.w == 1 && to.w == 1 && s.width % kVec == 0 &&
                      from.c % kVec == 0 && to.c % kVec == 0;
  // Enough blocks for the largest chips, each with several accesses for a thread.
  const int64_t total = s.images * pixels * part.channels;
  const int64_t elements = std::clamp<int64_t>(total / 1024, 4096, 16384);

  GroupNormTileParams tile;
  tile.op = p;
  tile.part = index;
  LaunchConfig config;
  config.threads = kThreads;
  int64_t chunk;
  if (last) {
    const int64_t vectors = part.channels / kVec;
    const int64_t slabs = ceil_div(vectors, kThreads);
    const int64_t slab = ceil_div(vectors, slabs);
    tile.rows = static_cast<int>(kThreads / slab);
    tile.channel_chunk = static_cast<int>(slab * kVec);
    chunk = std::clamp<int64_t>(elements / tile.channel_chunk, 1, pixels);
    config.threads = static_cast<int>(ceil_div(tile.rows * slab, kWarpSize) * kWarpSize);
  } else {
    chunk = std::min(pixels, elements);
    if (from.c == 1 && !planar) chunk = std::clamp<int64_t>(elements / part.channels, 1, pixels);
    if (planar) chunk = std::min(pixels, ceil_div(chunk, kVec) * kVec);
    constexpr int64_t kMaxChannels = 2048;  // 24 KiB of coefficients
    tile.channel_chunk = static_cast<int>(
        std::clamp<int64_t>(elements / chunk, 1, std::min(part.channels, kMaxChannels)));
    config.shared_bytes = 3 * sizeof(float) * tile.channel_chunk;
  }
  tile.chunk = static_cast<int>(chunk);
  tile.chunks = static_cast<int>(ceil_div(pixels, chunk));
  config.grid_x = s.images * tile.chunks;
  config.grid_y = ceil_div(part.channels, tile.channel_chunk);
  if (last) {
    launch<group_norm_apply_channels_last_kernel<GroupNormApplyTraits<T, kVec>>>(kOp, config,
                                                                                 stream, tile);
  } else if (planar) {
    launch<group_norm_apply_tile_kernel<GroupNormApplyTraits<T, kVec>>>(kOp, config, stream, tile);
  } else {
    launch<group_norm_apply_tile_kernel<GroupNormApplyTraits<T, 1>>>(kOp, config, stream, tile);
  }
}

}  // namespace

void launch_group_norm_apply(const GroupNormApplyParams& p, Stream stream) {
  dispatch_dtype(kOp, p.source.dtype, [&](auto tag) {
    for (int i = 0; i < p.source.parts; ++i) {
      launch_part<typename decltype(tag)::type>(p, i, stream);
    }
  });
}

}  // namespace accelrt
