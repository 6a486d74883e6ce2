#include <algorithm>

#include "accelrt/coarse.h"
#include "accelrt/dispatch.h"
#include "accelrt/parallel.h"
#include "accelrt/streaming.h"
#include "accelrt/vec.h"
#include "kernels/activation/activation.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

// For a result that is rounded to T.
template <typename T, ActivationKind kKind>
Vec apply(Vec x) {
  if constexpr (kKind == ActivationKind::kSiLU) return silu_to<T>(x);
  if constexpr (kKind == ActivationKind::kGELU) return gelu_to<T>(x);
  return gelu_tanh_to<T>(x);
}

// n elements with unit strides. No __restrict__: out may be x.
template <typename T, ActivationKind kKind, bool kBias>
void contiguous_part(const T* x, const T* bias, T* out, int64_t n, bool past) {
  for_pairs(
      n,
      [&](int64_t i) {
        Vec a, b;
        load_pair(x + i, a, b);
        if constexpr (kBias) {
          Vec c, d;
          load_pair(bias + i, c, d);
          a += c;
          b += d;
        }
        store_pair(out + i, apply<T, kKind>(a), apply<T, kKind>(b), past);
      },
      [&](int64_t i, int lanes) {
        Vec v = load_any(x + i, lanes);
        if constexpr (kBias) v += load_any(bias + i, lanes);
        store_any(out + i, lanes, apply<T, kKind>(v));
      });
}

// [begin, end) of one row.
template <typename T, ActivationKind kKind>
void row_part(const ActivationParams& p, const T* x, T* out, int64_t begin, int64_t end,
              bool streams) {
  const T* bias = static_cast<const T*>(p.bias);
  if (p.rows.unit_inner()) {
    const bool past = streams && starts_line(out + begin);
    if (bias != nullptr) {
      contiguous_part<T, kKind, true>(x + begin, bias + begin, out + begin, end - begin, past);
    } else {
      contiguous_part<T, kKind, false>(x + begin, nullptr, out + begin, end - begin, past);
    }
    return;
  }
  for (int64_t at = begin; at < end; ++at) {
    float v = to_float(x[at * p.rows.inner_stride[0]]);
    if (bias != nullptr) v += to_float(bias[at]);
    out[at * p.rows.inner_stride[1]] = from_float<T>(apply<T, kKind>(Vec(v)).v[0]);
  }
}

template <typename T, ActivationKind kKind>
void run(const ActivationParams& p) {
  // Rows are cut into pieces, so that one long row is shared by the threads too.
  constexpr int64_t kPiece = 16384;
  const int64_t pieces = (p.rows.inner + kPiece - 1) / kPiece;
  const int64_t grain = std::max<int64_t>(1, kPiece / std::min(p.rows.inner, kPiece));
  const bool streams =
      p.out != p.x && worth_streaming(p.rows.rows * p.rows.inner * size_of(p.dtype));
  parallel_for(0, p.rows.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t offset[2];
      p.rows.offsets(i / pieces, offset);
      const int64_t from = (i % pieces) * kPiece;
      row_part<T, kKind>(p, static_cast<const T*>(p.x) + offset[0],
                         static_cast<T*>(p.out) + offset[1], from,
                         std::min(from + kPiece, p.rows.inner), streams);
    }
    end_streaming(streams);
  });
}

}  // namespace

void activation_cpu(const ActivationParams& p) {
  dispatch_dtype("activation", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (p.kind) {
      case ActivationKind::kSiLU: run<T, ActivationKind::kSiLU>(p); break;
      case ActivationKind::kGELU: run<T, ActivationKind::kGELU>(p); break;
      case ActivationKind::kGELUTanh: run<T, ActivationKind::kGELUTanh>(p); break;
    }
  });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
