#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"
#include "kernels/activation/activation.cuh"

namespace accelrt {
namespace {

template <typename T, int kVec, ActivationKind kKind>
void launch_one(const ActivationParams& p, Stream stream) {
  using Traits = ActivationTraits<T, kVec, kKind>;
  const int64_t items = p.rows.rows * (p.rows.inner / kVec);
  launch<activation_kernel<Traits>>("activation", elementwise_config(items, Traits::kThreads),
                                    stream, p);
}

template <typename T, int kVec>
void launch_kind(const ActivationParams& p, Stream stream) {
  switch (p.kind) {
    case ActivationKind::kSiLU: launch_one<T, kVec, ActivationKind::kSiLU>(p, stream); break;
    case ActivationKind::kGELU: launch_one<T, kVec, ActivationKind::kGELU>(p, stream); break;
    case ActivationKind::kGELUTanh:
      launch_one<T, kVec, ActivationKind::kGELUTanh>(p, stream);
      break;
  }
}

}  // namespace

void launch_activation(const ActivationParams& p, Stream stream) {
  dispatch_dtype("activation", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const void* const pointers[] = {p.x, p.out};
    if (can_vectorise<2>(p.rows, pointers, sizeof(T)) && aligned_to(p.bias, 16)) {
      launch_kind<T, 16 / sizeof(T)>(p, stream);
    } else {
      launch_kind<T, 1>(p, stream);
    }
  });
}

}  // namespace accelrt
