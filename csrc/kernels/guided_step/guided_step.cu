#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"
#include "kernels/guided_step/guided_step.cuh"

namespace accelrt {
namespace {

template <typename T, int kVec>
void launch_one(const GuidedStepParams& p, Stream stream) {
  using Traits = GuidedStepTraits<T, kVec>;
  const int64_t items = p.rows.rows * (p.rows.inner / kVec);
  launch<guided_step_kernel<Traits>>("guided_step", elementwise_config(items, Traits::kThreads),
                                     stream, p);
}

}  // namespace

void launch_guided_step(const GuidedStepParams& p, Stream stream) {
  dispatch_dtype("guided_step", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const void* const pointers[] = {p.out, p.sample, p.cond, p.uncond, p.history, p.eps_out};
    if (can_vectorise<6>(p.rows, pointers, sizeof(T))) {
      launch_one<T, 16 / sizeof(T)>(p, stream);
    } else {
      launch_one<T, 1>(p, stream);
    }
  });
}

}  // namespace accelrt
