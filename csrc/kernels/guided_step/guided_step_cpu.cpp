#include "accelrt/dispatch.h"
#include "accelrt/rows_cpu.h"
#include "kernels/guided_step/guided_step.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

template <typename T>
struct Row {
  Row(const GuidedStepParams& p, const int64_t (&offset)[6])
      : out(static_cast<T*>(p.out) + offset[0]),
        sample(static_cast<const T*>(p.sample) + offset[1]),
        cond(static_cast<const T*>(p.cond) + offset[2]),
        uncond(p.uncond == nullptr ? nullptr : static_cast<const T*>(p.uncond) + offset[3]),
        history(p.history == nullptr ? nullptr : static_cast<const T*>(p.history) + offset[4]),
        eps_out(p.eps_out == nullptr ? nullptr : static_cast<T*>(p.eps_out) + offset[5]) {}
  T* out;
  const T* sample;
  const T* cond;
  const T* uncond;
  const T* history;
  T* eps_out;
};

template <typename T, bool kUnit, bool kUncond, bool kHistory>
void run(const GuidedStepParams& p) {
  const auto& stride = p.rows.inner_stride;
  const Vec guidance(p.guidance_scale);
  const Vec sample_coef(p.sample_coef);
  const Vec eps_coef(p.eps_coef);
  const Vec history_coef(p.history_coef);
  for_row_pieces(p.rows, [&](int64_t, const int64_t (&offset)[6], int64_t from, int64_t to) {
    const Row<T> row(p, offset);
    for_lanes(to - from, [&](int64_t i, int n) {
      const int64_t at = from + i;
      Vec eps = load_row<kUnit>(row.cond, at, stride[2], n);
      if constexpr (kUncond) {
        const Vec uncond = load_row<kUnit>(row.uncond, at, stride[3], n);
        eps = fma(guidance, eps - uncond, uncond);
      }
      Vec result = sample_coef * load_row<kUnit>(row.sample, at, stride[1], n);
      result = fma(eps_coef, eps, result);
      if constexpr (kHistory) {
        result = fma(history_coef, load_row<kUnit>(row.history, at, stride[4], n), result);
      }
      if (row.eps_out != nullptr) store_row<kUnit>(row.eps_out, at, stride[5], n, eps);
      store_row<kUnit>(row.out, at, stride[0], n, result);
    });
  });
}

}  // namespace

void guided_step_cpu(const GuidedStepParams& p) {
  dispatch_dtype("guided_step", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_bool(p.uncond != nullptr, [&](auto uncond) {
      dispatch_bool(p.history != nullptr, [&](auto history) {
        constexpr bool kUncond = decltype(uncond)::value;
        constexpr bool kHistory = decltype(history)::value;
        p.rows.unit_inner() ? run<T, true, kUncond, kHistory>(p)
                            : run<T, false, kUncond, kHistory>(p);
      });
    });
  });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
