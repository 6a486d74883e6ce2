#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"
#include "kernels/weighted_sum/weighted_sum.cuh"

namespace accelrt {
namespace {

template <typename T, int kVec, int kSlots>
void launch_one(WeightedSumParams p, Stream stream) {
  using Traits = WeightedSumTraits<T, kVec, kSlots>;
  constexpr int64_t kMaxBlocks = 132 * 16;  // fills the largest chips several times over
  const int64_t per_block = static_cast<int64_t>(Traits::kThreads) * Traits::kPlaces;
  const int64_t wanted = (p.rows.inner / kVec + per_block - 1) / per_block;
  const int64_t most = std::max<int64_t>(1, kMaxBlocks / p.rows.rows);
  p.blocks = std::clamp<int64_t>(wanted, 1, most);
  LaunchConfig config;
  config.grid_x = p.rows.rows * p.blocks;
  config.threads = Traits::kThreads;
  launch<weighted_sum_kernel<Traits>>("weighted_sum", config, stream, p);
}

template <typename T, int kVec>
void launch_slots(const WeightedSumParams& p, Stream stream) {
  switch (p.slots) {
    case 1: launch_one<T, kVec, 1>(p, stream); return;
    case 2: launch_one<T, kVec, 2>(p, stream); return;
    case 3: launch_one<T, kVec, 3>(p, stream); return;
    case 4: launch_one<T, kVec, 4>(p, stream); return;
    default: launch_one<T, kVec, 0>(p, stream); return;
  }
}

}  // namespace

void launch_weighted_sum(const WeightedSumParams& p, Stream stream) {
  dispatch_dtype("weighted_sum", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kVec = 16 / sizeof(T);
    const bool aligned =
        aligned_to(p.features, 16) && aligned_to(p.base, 16) && aligned_to(p.out, 16);
    // Every slot and row starts at a multiple of the row's length.
    if (aligned && p.rows.inner % kVec == 0) {
      launch_slots<T, kVec>(p, stream);
    } else {
      launch_slots<T, 1>(p, stream);
    }
  });
}

}  // namespace accelrt
