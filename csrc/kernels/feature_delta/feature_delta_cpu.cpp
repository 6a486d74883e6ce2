#include <cmath>
#include <limits>
#include <vector>

#include "accelrt/dispatch.h"
#include "accelrt/rows_cpu.h"
#include "kernels/feature_delta/feature_delta.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

// The sums of a chunk: float within it, double between chunks. A lane adds at most 256 values,
// so the error does not grow with the tensor.
constexpr int kAccumulators = 4;
constexpr int64_t kChunk = 256 * kLanes * kAccumulators;

struct Sums {
  double delta = 0;
  double norm = 0;
};

template <int kP>
Vec magnitude(Vec x) {
  if constexpr (kP == 1) return abs(x);
  return x * x;
}

double total(const Vec (&partial)[kAccumulators]) {
  double s = 0;
  for (const Vec& v : partial) {
    for (int lane = 0; lane < kLanes; ++lane) s += static_cast<double>(v.v[lane]);
  }
  return s;
}

// Of elements [from, from + count) of a row.
template <typename T, int kP, bool kUnit>
Sums row_sums(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t from,
              int64_t count) {
  Vec delta[kAccumulators] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  Vec norm[kAccumulators] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  auto add = [&](int u, int64_t at, int n) {
    const Vec x = load_row<kUnit>(a, at, a_stride, n);
    const Vec y = load_row<kUnit>(b, at, b_stride, n);
    delta[u] += magnitude<kP>(x - y);
    norm[u] += magnitude<kP>(y);
  };
  constexpr int64_t kStep = kLanes * kAccumulators;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
    for (int u = 0; u < kAccumulators; ++u) add(u, from + i + u * kLanes, kLanes);
  }
  for_lanes(count - i, [&](int64_t j, int n) { add(0, from + i + j, n); });
  return {total(delta), total(norm)};
}

template <typename T, int kP, bool kUnit>
void run(const FeatureDeltaParams& p) {
  // A sample's rows, cut into pieces of at most kChunk elements, in groups of about kChunk
  // elements: one partial sum each, so that the result does not depend on the threads.
  const int64_t inner = p.rows.inner;
  const int64_t pieces = (inner + kChunk - 1) / kChunk;
  const int64_t units = p.rows_per_sample * pieces;
  const int64_t group = std::max<int64_t>(1, kChunk / std::min(inner, kChunk));
  const int64_t groups = (units + group - 1) / group;
  std::vector<Sums> partial(static_cast<size_t>(p.batch * groups));
  const int64_t group_elements =
      std::max<int64_t>(1, std::min(group, units) * std::min(inner, kChunk));
  const int64_t grain = std::max<int64_t>(1, 2 * kChunk / group_elements);
  parallel_for(0, p.batch * groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / groups;
      const int64_t first = i % groups * group;
      const int64_t last = std::min(first + group, units);
      int64_t row = sample * p.rows_per_sample + first / pieces;
      int64_t piece = first % pieces;
      RowCursor<2> cursor(p.rows, row);
      Sums sums;
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t from = piece * kChunk;
        const int64_t n = std::min(kChunk, inner - from);
        const T* a = static_cast<const T*>(p.a) + cursor.offset()[0];
        const T* b = static_cast<const T*>(p.b) + cursor.offset()[1];
        const Sums part =
            row_sums<T, kP, kUnit>(a, p.rows.inner_stride[0], b, p.rows.inner_stride[1], from, n);
        sums.delta += part.delta;
        sums.norm += part.norm;
        if (++piece == pieces) {
          piece = 0;
          cursor.next();
        }
      }
      partial[static_cast<size_t>(i)] = sums;
    }
  });
  for (int64_t sample = 0; sample < p.batch; ++sample) {
    Sums sums;
    for (int64_t g = 0; g < groups; ++g) {
      const Sums& part = partial[static_cast<size_t>(sample * groups + g)];
      sums.delta += part.delta;
      sums.norm += part.norm;
    }
    if (kP == 2) sums = {std::sqrt(sums.delta), std::sqrt(sums.norm)};
    constexpr double kTiny = std::numeric_limits<float>::min();
    // A NaN sum stays: max(NaN, tiny) would hide it.
    const double norm = sums.norm < kTiny ? kTiny : sums.norm;
    p.out[sample * p.out_stride] = static_cast<float>(sums.delta / norm);
  }
}

}  // namespace

void feature_delta_cpu(const FeatureDeltaParams& p) {
  dispatch_dtype("feature_delta", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_bool(p.rows.unit_inner(), [&](auto unit) {
      constexpr bool kUnit = decltype(unit)::value;
      p.p == 1 ? run<T, 1, kUnit>(p) : run<T, 2, kUnit>(p);
    });
  });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
