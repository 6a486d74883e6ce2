#include <algorithm>

#include "accelrt/coarse.h"
#include "accelrt/dispatch.h"
#include "accelrt/parallel.h"
#include "accelrt/streaming.h"
#include "accelrt/vec.h"
#include "kernels/geglu/geglu.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

// value * gelu(gate), for a result that is rounded to T.
template <typename T, ActivationKind kKind>
Vec apply(Vec value, Vec gate) {
  if constexpr (kKind == ActivationKind::kGELU) return value * gelu_to<T>(gate);
  return value * gelu_tanh_to<T>(gate);
}

// n elements of one row, all pointers with unit stride. No __restrict__: out may be the value.
template <typename T, ActivationKind kKind, bool kBias>
void contiguous_part(const T* value, const T* gate, const T* value_bias, const T* gate_bias, T* out,
                     int64_t n, bool past) {
  // The halves of a row are short runs, which the hardware's prefetcher follows late. What lies
  // behind a half is the other half, or the next row.
  constexpr int64_t kAhead = 8192 / sizeof(T);
  for_pairs(
      n,
      [&](int64_t i) {
        for (int64_t line = 0; line < 2 * kLanes; line += 64 / sizeof(T)) {
          __builtin_prefetch(value + i + line + kAhead, 0, 2);
          __builtin_prefetch(gate + i + line + kAhead, 0, 2);
        }
        Vec v0, v1, g0, g1;
        load_pair(value + i, v0, v1);
        load_pair(gate + i, g0, g1);
        if constexpr (kBias) {
          Vec a, b;
          load_pair(value_bias + i, a, b);
          v0 += a;
          v1 += b;
          load_pair(gate_bias + i, a, b);
          g0 += a;
          g1 += b;
        }
        store_pair(out + i, apply<T, kKind>(v0, g0), apply<T, kKind>(v1, g1), past);
      },
      [&](int64_t i, int lanes) {
        Vec v = load_any(value + i, lanes);
        Vec g = load_any(gate + i, lanes);
        if constexpr (kBias) {
          v += load_any(value_bias + i, lanes);
          g += load_any(gate_bias + i, lanes);
        }
        store_any(out + i, lanes, apply<T, kKind>(v, g));
      });
}

// [begin, end) of one row of any strides: vectors are gathered and scattered by element.
template <typename T, ActivationKind kKind>
void strided_part(const GegluParams& p, const T* value, const T* gate, T* out, int64_t begin,
                  int64_t end) {
  const T* value_bias = static_cast<const T*>(p.bias);
  const T* gate_bias = static_cast<const T*>(p.gate_bias);
  const int64_t x_stride = p.rows.inner_stride[0];
  const int64_t out_stride = p.rows.inner_stride[1];
  for (int64_t at = begin; at < end; at += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, end - at));
    Vec v(0.f);
    Vec g(0.f);
    for (int k = 0; k < lanes; ++k) {
      v.v[k] = to_float(value[(at + k) * x_stride]);
      g.v[k] = to_float(gate[(at + k) * x_stride]);
      if (value_bias != nullptr) {
        v.v[k] += to_float(value_bias[at + k]);
        g.v[k] += to_float(gate_bias[at + k]);
      }
    }
    const Vec result = apply<T, kKind>(v, g);
    for (int k = 0; k < lanes; ++k) out[(at + k) * out_stride] = from_float<T>(result.v[k]);
  }
}

template <typename T, ActivationKind kKind>
void run(const GegluParams& p) {
  // Rows are cut into pieces, so that one long row is shared by the threads too.
  constexpr int64_t kPiece = 8192;
  const int64_t pieces = (p.rows.inner + kPiece - 1) / kPiece;
  const int64_t grain = std::max<int64_t>(1, kPiece / std::min(p.rows.inner, kPiece));
  const T* bias = static_cast<const T*>(p.bias);
  const T* gate_bias = static_cast<const T*>(p.gate_bias);
  const bool unit = p.rows.unit_inner();
  const bool streams =
      p.out != p.x && worth_streaming(p.rows.rows * p.rows.inner * size_of(p.dtype));
  parallel_for(0, p.rows.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t offset[2];
      p.rows.offsets(i / pieces, offset);
      const T* value = static_cast<const T*>(p.x) + offset[0];
      const T* gate = static_cast<const T*>(p.gate) + offset[0];
      T* out = static_cast<T*>(p.out) + offset[1];
      const int64_t from = (i % pieces) * kPiece;
      const int64_t to = std::min(from + kPiece, p.rows.inner);
      const bool past = streams && starts_line(out + from);
      if (!unit) {
        strided_part<T, kKind>(p, value, gate, out, from, to);
      } else if (bias != nullptr) {
        contiguous_part<T, kKind, true>(value + from, gate + from, bias + from, gate_bias + from,
                                        out + from, to - from, past);
      } else {
        contiguous_part<T, kKind, false>(value + from, gate + from, nullptr, nullptr, out + from,
                                         to - from, past);
      }
    }
    end_streaming(streams);
  });
}

}  // namespace

void geglu_cpu(const GegluParams& p) {
  dispatch_dtype("geglu", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.kind == ActivationKind::kGELU) {
      run<T, ActivationKind::kGELU>(p);
    } else {
      run<T, ActivationKind::kGELUTanh>(p);
    }
  });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
