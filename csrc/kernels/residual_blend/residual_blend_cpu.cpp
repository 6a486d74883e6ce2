#include "accelrt/dispatch.h"
#include "accelrt/rows_cpu.h"
#include "kernels/residual_blend/residual_blend.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

// out[i] = fn(x[i], y[i]) over [from, to) of a row.
template <typename T, bool kUnit, typename Fn>
void row_piece(const ResidualBlendParams& p, const int64_t (&offset)[3], int64_t from, int64_t to,
               const Fn& fn) {
  const auto& stride = p.rows.inner_stride;
  T* out = static_cast<T*>(p.out) + offset[0];
  const T* x = static_cast<const T*>(p.x) + offset[1];
  const T* y = static_cast<const T*>(p.y) + offset[2];
  auto blend = [&](int64_t at, int n) {
    const Vec a = load_row<kUnit>(x, at, stride[1], n);
    const Vec b = load_row<kUnit>(y, at, stride[2], n);
    return fn(a, b);
  };
  // Four vectors in flight, which the compiler may not arrange itself: out may be x or y.
  constexpr int kUnroll = 4;
  int64_t at = from;
  for (; at + kUnroll * kLanes <= to; at += kUnroll * kLanes) {
    Vec result[kUnroll];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) result[u] = blend(at + u * kLanes, kLanes);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      store_row<kUnit>(out, at + u * kLanes, stride[0], kLanes, result[u]);
    }
  }
  for_lanes(to - at, [&](int64_t i, int n) {
    store_row<kUnit>(out, at + i, stride[0], n, blend(at + i, n));
  });
}

template <typename T, bool kUnit>
void run(const ResidualBlendParams& p) {
  const Vec scale(p.scale);
  for_row_pieces(p.rows, [&](int64_t row, const int64_t (&offset)[3], int64_t from, int64_t to) {
    if (p.alpha == nullptr) {
      // Not scale * x + scale * y, which loses the exact cancellation of x + y.
      row_piece<T, kUnit>(p, offset, from, to, [=](Vec x, Vec y) { return (x + y) * scale; });
      return;
    }
    const float alpha = p.alpha[row / p.rows_per_sample * p.alpha_stride];
    const Vec wx(alpha * p.scale);
    const Vec wy((1.f - alpha) * p.scale);
    row_piece<T, kUnit>(p, offset, from, to, [=](Vec x, Vec y) { return fma(x, wx, y * wy); });
  });
}

}  // namespace

void residual_blend_cpu(const ResidualBlendParams& p) {
  dispatch_dtype("residual_blend", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    p.rows.unit_inner() ? run<T, true>(p) : run<T, false>(p);
  });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
