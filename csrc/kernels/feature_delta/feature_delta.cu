#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"
#include "kernels/feature_delta/feature_delta.cuh"

namespace accelrt {
namespace {

template <typename T, int kVec>
void launch_partial(const FeatureDeltaParams& p, Stream stream) {
  using Traits = FeatureDeltaTraits<T, kVec>;
  LaunchConfig config;
  config.grid_x = p.batch * p.blocks;
  config.threads = Traits::kThreads;
  config.shared_bytes = Traits::kSharedBytes;
  launch<feature_delta_partial_kernel<Traits>>("feature_delta", config, stream, p);
}

}  // namespace

void launch_feature_delta(const FeatureDeltaParams& p, Stream stream) {
  dispatch_dtype("feature_delta", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const void* const pointers[] = {p.a, p.b};
    if (can_vectorise<2>(p.rows, pointers, sizeof(T))) {
      launch_partial<T, 16 / sizeof(T)>(p, stream);
    } else {
      launch_partial<T, 1>(p, stream);
    }
  });
  LaunchConfig config;
  config.grid_x = p.batch;
  config.threads = kWarpSize;
  launch<feature_delta_final_kernel>("feature_delta", config, stream, p);
}

}  // namespace accelrt
