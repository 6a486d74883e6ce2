// What the forms of attention share: the part of a head that is computed at a time, its scratch,
// the bias, the running softmax of a row.
#pragma once

#include <algorithm>
#include <cmath>

#include "accelrt/aligned.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/attention_math.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace attention_parts {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Some queries of one head. A head has `groups` units of at most `most` queries.
template <typename T>
struct Unit {
  Unit(const AttentionParams& p, int64_t most, int64_t groups, int64_t index) {
    const int64_t head = index / groups % p.heads;
    const int64_t batch = index / groups / p.heads;
    first = index % groups * most;
    queries = std::min(most, p.queries - first);
    const auto at = [&](const void* data, const TokenStrides& s, int64_t token) {
      return static_cast<const T*>(data) + batch * s.batch + head * s.head + token * s.token;
    };
    q = at(p.q, p.q_stride, first);
    k = at(p.k, p.k_stride, 0);
    v = at(p.v, p.v_stride, 0);
    bias = p.bias == nullptr ? nullptr : at(p.bias, p.bias_stride, first);
    out = const_cast<T*>(at(p.out, p.out_stride, first));
  }
  int64_t first;
  int64_t queries;
  const T* q;
  const T* k;
  const T* v;
  const T* bias;
  T* out;
};

// to[padded] = bias, or zeros without one; -inf past `count`.
template <typename T>
void load_bias(const T* bias, int64_t count, int64_t padded, float* to) {
  for (int64_t i = 0; i < padded; i += kLanes) {
    const int n = static_cast<int>(std::clamp<int64_t>(count - i, 0, kLanes));
    if (bias == nullptr) {
      for (int lane = 0; lane < kLanes; ++lane) to[i + lane] = lane < n ? 0.f : -INFINITY;
    } else {
      store(to + i, load_any(bias + i, n, -INFINITY));
    }
  }
}

// Takes a block of keys into the softmax of a row: replaces its `count` scores, of which `raised`
// is the maximum, by weights, and scales what is in `out` [row floats] and in the sums [one vector]
// down where that raises the maximum so far, `top`. The first block finds nothing in `out`.
template <typename M>
inline void weigh_row(float raised, float factor, bool first, int64_t count, int64_t row,
                      float& top, float* sums, float* out, float* scores) {
  if (raised > top) {
    if (!first) {
      const Vec correction(exp2f((top - raised) * factor));
      store(sums, load(sums) * correction);
      for (int64_t c = 0; c < row; c += kLanes) store(out + c, load(out + c) * correction);
    }
    top = raised;
  }
  store(sums, load(sums) + M::weigh(scores, count, factor, top));
}

// The finished row: what is in `out`, divided by the sum of its weights; zeros without any.
template <typename T>
inline void write_row(const float* out, const float* sums, int64_t dim, T* to) {
  const float total = sum(load(sums));
  const Vec inverse(total == 0.f ? 0.f : 1.f / total);
  for_lanes(dim, [&](int64_t c, int n) { store_any(to + c, n, load(out + c) * inverse); });
}

}  // namespace attention_parts
}  // namespace ACCELRT_ISA
}  // namespace accelrt
