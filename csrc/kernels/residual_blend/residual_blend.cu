#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"
#include "kernels/residual_blend/residual_blend.cuh"

namespace accelrt {
namespace {

template <typename T, int kVec>
void launch_one(const ResidualBlendParams& p, Stream stream) {
  using Traits = ResidualBlendTraits<T, kVec>;
  const int64_t items = p.rows.rows * (p.rows.inner / kVec);
  launch<residual_blend_kernel<Traits>>("residual_blend",
                                        elementwise_config(items, Traits::kThreads), stream, p);
}

}  // namespace

void launch_residual_blend(const ResidualBlendParams& p, Stream stream) {
  dispatch_dtype("residual_blend", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const void* const pointers[] = {p.out, p.x, p.y};
    if (can_vectorise<3>(p.rows, pointers, sizeof(T))) {
      launch_one<T, 16 / sizeof(T)>(p, stream);
    } else {
      launch_one<T, 1>(p, stream);
    }
  });
}

}  // namespace accelrt
