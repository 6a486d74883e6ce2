#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"
#include "kernels/geglu/geglu.cuh"

namespace accelrt {
namespace {

template <typename T, int kVec, ActivationKind kKind>
void launch_one(const GegluParams& p, Stream stream) {
  using Traits = GegluTraits<T, kVec, kKind>;
  const int64_t items = p.rows.rows * (p.rows.inner / kVec);
  launch<geglu_kernel<Traits>>("geglu", elementwise_config(items, Traits::kThreads), stream, p);
}

template <typename T, int kVec>
void launch_kind(const GegluParams& p, Stream stream) {
  if (p.kind == ActivationKind::kGELU) {
    launch_one<T, kVec, ActivationKind::kGELU>(p, stream);
  } else {
    launch_one<T, kVec, ActivationKind::kGELUTanh>(p, stream);
  }
}

}  // namespace

void launch_geglu(const GegluParams& p, Stream stream) {
  dispatch_dtype("geglu", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const void* const pointers[] = {p.x, p.out};
    // An aligned row may still have its second half off alignment.
    if (can_vectorise<2>(p.rows, pointers, sizeof(T)) && aligned_to(p.gate, 16) &&
        aligned_to(p.bias, 16) && aligned_to(p.gate_bias, 16)) {
      launch_kind<T, 16 / sizeof(T)>(p, stream);
    } else {
      launch_kind<T, 1>(p, stream);
    }
  });
}

}  // namespace accelrt
