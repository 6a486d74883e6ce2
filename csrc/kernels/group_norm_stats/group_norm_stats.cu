#include "kernels/group_norm_stats/group_norm_stats.cuh"

#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"

namespace accelrt {
namespace {

constexpr const char* kOp = "group_norm_stats";
constexpr int kThreads = 256;

// How the first launch cuts the work. It depends on the sizes, strides and pointers alone.
struct Plan {
  bool channels_last = false;
  bool vectors = false;  // 16-byte accesses along the pixels, if not channels_last
  int64_t chunk = 1;
  int64_t chunks = 0;
  int64_t slab_groups = 0;
};

bool multiple(const ImageStrides& s, int64_t lanes) { return s.n % lanes == 0 && s.h % lanes == 0; }

Plan make_plan(const GroupNormSource& s) {
  Plan plan;
  const int64_t lanes = 16 / size_of(s.dtype);
  const int64_t pixels = s.pixels();
  if (pixels == 0 || s.channels == 0 || s.images == 0) return plan;
  bool aligned = true;  // for 16-byte accesses, whichever axis they run along
  bool planar = s.width % lanes == 0;
  bool last = true;
  for (int i = 0; i < s.parts; ++i) {
    const GroupNormPart& part = s.part[i];
    aligned &= aligned_to(part.data, 16) && multiple(part.stride, lanes);
    planar &= part.stride.w == 1 && part.stride.c % lanes == 0;
    last &= part.stride.c == 1 && part.stride.w % lanes == 0 && part.first % lanes == 0;
  }
  if (aligned && last) {
    for (int64_t n = s.groups; n >= 1 && plan.slab_groups == 0; --n) {
      const int64_t channels = n * s.group_channels;
      if (s.groups % n == 0 && channels % lanes == 0 && channels <= kThreads * lanes) {
        plan.slab_groups = n;
      }
    }
  }
  plan.channels_last = plan.slab_groups > 0;
  plan.vectors = !plan.channels_last && aligned && planar;
  // Enough blocks for the largest chips, each with enough work to hide its merging.
  const int64_t width = (plan.channels_last ? plan.slab_groups : 1) * s.group_channels;
  const int64_t total = s.images * pixels * s.channels;
  const int64_t elements = std::clamp<int64_t>(total / 1024, 8192, 65536);
  plan.chunk = std::clamp<int64_t>(elements / width, 1, pixels);
  if (plan.vectors) plan.chunk = std::min(pixels, (plan.chunk + lanes - 1) / lanes * lanes);
  plan.chunks = (pixels + plan.chunk - 1) / plan.chunk;
  return plan;
}

template <typename T>
void launch_partial(const GroupNormStatsParams& p, const Plan& plan, Stream stream) {
  constexpr int kVec = 16 / sizeof(T);
  const GroupNormSource& s = p.source;
  GroupNormPartialParams partial;
  partial.source = s;
  partial.partial = p.workspace;
  partial.chunks = static_cast<int>(plan.chunks);
  partial.chunk = static_cast<int>(plan.chunk);
  LaunchConfig config;
  config.grid_x = s.images * plan.chunks;
  config.threads = kThreads;
  if (plan.channels_last) {
    const int64_t channels = plan.slab_groups * s.group_channels;
    const int64_t vectors = channels / kVec;
    partial.slab_groups = static_cast<int>(plan.slab_groups);
    partial.rows = static_cast<int>(kThreads / vectors);
    config.grid_y = s.groups / plan.slab_groups;
    config.threads = static_cast<int>((partial.rows * vectors + 31) / 32 * 32);
    config.shared_bytes = 2 * sizeof(float) * partial.rows * channels;
    launch<group_norm_stats_channels_last_kernel<GroupNormStatsTraits<T, kVec>>>(kOp, config,
                                                                                 stream, partial);
    return;
  }
  config.grid_y = s.groups;
  config.shared_bytes = 3 * sizeof(float) * (kThreads / kWarpSize);
  ACCELRT_CHECK(s.group_channels * plan.chunk <= 2147483647 - kThreads, kOp, ": ", s.group_channels,
                " channels in a group");
  if (plan.vectors) {
    launch<group_norm_stats_group_kernel<GroupNormStatsTraits<T, kVec>>>(kOp, config, stream,
                                                                         partial);
  } else {
    launch<group_norm_stats_group_kernel<GroupNormStatsTraits<T, 1>>>(kOp, config, stream, partial);
  }
}

}  // namespace

int64_t group_norm_stats_workspace_cuda(const GroupNormSource& source) {
  return source.images * make_plan(source).chunks * source.groups * 3;
}

void launch_group_norm_stats(const GroupNormStatsParams& p, Stream stream) {
  const GroupNormSource& s = p.source;
  const Plan plan = make_plan(s);
  if (plan.chunks > 0) {
    dispatch_dtype(kOp, s.dtype, [&](auto tag) {
      launch_partial<typename decltype(tag)::type>(p, plan, stream);
    });
  }
  GroupNormMergeParams merge;
  merge.partial = p.workspace;
  merge.out = p.out;
  merge.clips = s.images / s.frames;
  merge.items = s.frames * plan.chunks;
  merge.groups = s.groups;
  merge.accumulate = p.accumulate;
  LaunchConfig config;
  constexpr int kMergeThreads = 128;
  config.threads = kMergeThreads;
  constexpr int64_t kWarps = kMergeThreads / kWarpSize;
  config.grid_x = (merge.clips * merge.groups + kWarps - 1) / kWarps;
  launch<group_norm_merge_kernel<kMergeThreads>>(kOp, config, stream, merge);
}

}  // namespace accelrt
