// Two passes over a row that the first-level cache holds: the moments about a pivot, then the
// result. Everything that is one vector per sample is brought to float32 once per sample, as the
// factor and the offset of a single multiply-add. Float32 vectors that go with elements of T are
// kept in the order of load_pair<T>.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "accelrt/aligned.h"
#include "accelrt/dispatch.h"
#include "accelrt/parallel.h"
#include "accelrt/streaming.h"
#include "accelrt/vec.h"
#include "kernels/layer_norm/layer_norm.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

template <typename T>
const T* row_of(const LayerNormParams::Rows& t, int64_t b, int64_t s) {
  return static_cast<const T*>(t.data) + b * t.batch_stride + s * t.row_stride;
}

template <typename T>
T* row_to_write(const LayerNormParams::Rows& t, int64_t b, int64_t s) {
  return static_cast<T*>(t.data) + b * t.batch_stride + s * t.row_stride;
}

template <typename T>
const T* vector_of(const LayerNormParams::PerSample& t, int64_t b) {
  return t.data == nullptr ? nullptr : static_cast<const T*>(t.data) + b * t.batch_stride;
}

template <typename T>
void load_pair_or(const T* p, int64_t i, float otherwise, Vec& a, Vec& b) {
  a = Vec(otherwise);
  b = Vec(otherwise);
  if (p != nullptr) load_pair(p + i, a, b);
}

template <typename T>
Vec load_or(const T* p, int64_t i, int lanes, float otherwise) {
  return p == nullptr ? Vec(otherwise) : load_any(p + i, lanes);
}

// The float32 vectors of one thread, padded so that the last vector may be stored in full.
class Scratch {
 public:
  explicit Scratch(int64_t width)
      : stride_(whole_lines(width)), memory_(make_aligned(5 * stride_)) {}
  float* factor() { return memory_.get(); }
  float* offset() { return memory_.get() + stride_; }
  float* gate() { return memory_.get() + 2 * stride_; }
  float* inject_scale() { return memory_.get() + 3 * stride_; }
  float* row() { return memory_.get() + 4 * stride_; }

 private:
  int64_t stride_;
  AlignedFloats memory_;
};

// to = from, or `otherwise` where there is none.
template <typename T>
void prepare_vector(const T* from, float otherwise, int64_t n, float* to) {
  for_pairs(
      n,
      [&](int64_t i) {
        Vec a, b;
        load_pair_or(from, i, otherwise, a, b);
        store_pair(to + i, a, b);
      },
      [&](int64_t i, int lanes) { store(to + i, load_or(from, i, lanes, otherwise)); });
}

template <typename T, bool kResidual>
void prepare_sample(const LayerNormParams& p, int64_t b, Scratch& scratch) {
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  const T* scale = vector_of<T>(p.scale, b);
  const T* shift = vector_of<T>(p.shift, b);
  float* factor = scratch.factor();
  float* offset = scratch.offset();
  const Vec one(1.f);
  for_pairs(
      p.width,
      [&](int64_t i) {
        Vec w0, w1, b0, b1, s0, s1, t0, t1;
        load_pair_or(weight, i, 1.f, w0, w1);
        load_pair_or(bias, i, 0.f, b0, b1);
        load_pair_or(scale, i, 0.f, s0, s1);
        load_pair_or(shift, i, 0.f, t0, t1);
        store_pair(factor + i, w0 * (one + s0), w1 * (one + s1));
        store_pair(offset + i, fma(b0, one + s0, t0), fma(b1, one + s1, t1));
      },
      [&](int64_t i, int lanes) {
        const Vec one_plus = one + load_or(scale, i, lanes, 0.f);
        store(factor + i, load_or(weight, i, lanes, 1.f) * one_plus);
        store(offset + i,
              fma(load_or(bias, i, lanes, 0.f), one_plus, load_or(shift, i, lanes, 0.f)));
      });
  if constexpr (kResidual) {
    prepare_vector(vector_of<T>(p.gate, b), 1.f, p.width, scratch.gate());
    if (p.inject.data != nullptr) {
      prepare_vector(static_cast<const T*>(p.inject_scale), 1.f, p.width, scratch.inject_scale());
    }
  }
}

// Sums of the deviations from a pivot and of their squares.
struct Deviations {
  explicit Deviations(float about) : pivot(about) {}
  void add(Vec a, Vec b) {
    const Vec d0 = a - pivot;
    const Vec d1 = b - pivot;
    first[0] += d0;
    first[1] += d1;
    second[0] = fma(d0, d0, second[0]);
    second[1] = fma(d1, d1, second[1]);
  }
  // Lanes past the end must hold the pivot.
  void add(Vec a) {
    const Vec d = a - pivot;
    first[0] += d;
    second[0] = fma(d, d, second[0]);
  }
  Vec pivot;
  Vec first[2] = {Vec(0.f), Vec(0.f)};
  Vec second[2] = {Vec(0.f), Vec(0.f)};
};

struct Moments {
  float pivot = 0.f;
  float rest = 0.f;  // the mean is pivot + rest
  float variance = 0.f;

  // Whether the pivot lies so far from the mean that the variance has lost accuracy.
  bool cancelled() const { return rest * rest > 4.f * variance; }
};

Moments moments_of(const Deviations& d, float pivot, int64_t n) {
  const float inverse = 1.f / static_cast<float>(n);
  Moments m;
  m.pivot = pivot;
  m.rest = sum(d.first[0] + d.first[1]) * inverse;
  m.variance = std::max(sum(d.second[0] + d.second[1]) * inverse - m.rest * m.rest, 0.f);
  return m;
}

template <typename S>
Moments row_moments(const S* row, int64_t n, float pivot) {
  Deviations deviations(pivot);
  for_pairs(
      n,
      [&](int64_t i) {
        Vec a, b;
        load_pair(row + i, a, b);
        deviations.add(a, b);
      },
      [&](int64_t i, int lanes) { deviations.add(load_any(row + i, lanes, pivot)); });
  return moments_of(deviations, pivot, n);
}

// One row of the residual form: its inputs, and where it is kept in float32.
template <typename T, bool kInject>
struct ResidualRow {
  // No __restrict__: residual_out may be an input.
  const T* x;
  const T* residual;
  const T* inject;
  const float* gate;
  const float* inject_scale;
  T* residual_out;
  float* row;  // may be residual_out
  int64_t n;
  bool past;  // residual_out is stored past the caches

  void load(int64_t i, Vec& a, Vec& b) const {
    Vec x0, x1, g0, g1;
    load_pair(residual + i, a, b);
    load_pair(x + i, x0, x1);
    load_pair(gate + i, g0, g1);
    a = fma(g0, x0, a);
    b = fma(g1, x1, b);
    if constexpr (kInject) {
      load_pair(inject + i, x0, x1);
      load_pair(inject_scale + i, g0, g1);
      a = fma(g0, x0, a);
      b = fma(g1, x1, b);
    }
  }

  bool keeps_row() const { return static_cast<const void*>(row) != residual_out; }

  // Fills the row, and residual_out with its rounded values.
  Moments compute() const {
    float pivot = to_float(residual[0]) + gate[0] * to_float(x[0]);
    if constexpr (kInject) pivot += inject_scale[0] * to_float(inject[0]);
    Deviations deviations(pivot);
    for_pairs(
        n,
        [&](int64_t i) {
          Vec a, b;
          load(i, a, b);
          store_pair(residual_out + i, a, b, past);
          if (keeps_row()) store_pair(row + i, a, b);
          deviations.add(a, b);
        },
        [&](int64_t i, int lanes) {
          // Past the end x and inject read as zero, and residual as the pivot.
          Vec r = fma(load_any(gate + i, lanes), load_any(x + i, lanes),
                      load_any(residual + i, lanes, pivot));
          if constexpr (kInject) {
            r = fma(load_any(inject_scale + i, lanes), load_any(inject + i, lanes), r);
          }
          store_any(residual_out + i, lanes, r);
          if (keeps_row()) store(row + i, r);
          deviations.add(r);
        });
    Moments moments = moments_of(deviations, pivot, n);
    if (moments.cancelled()) moments = row_moments(row, n, moments.pivot + moments.rest);
    return moments;
  }
};

// out = (row - mean) / std * factor + offset. The row of T or of float32 is in the order of T.
template <typename S, typename T>
void normalise(const S* row, const Moments& m, int64_t n, float eps, const float* factor,
               const float* offset, T* out, bool past) {
  const float scale = 1.f / std::sqrt(m.variance + eps);
  const Vec pivot(m.pivot);
  const Vec rstd(scale);
  const Vec minus(-m.rest * scale);
  for_pairs(
      n,
      [&](int64_t i) {
        Vec a, b, f0, f1, o0, o1;
        load_pair(row + i, a, b);
        load_pair(factor + i, f0, f1);
        load_pair(offset + i, o0, o1);
        store_pair(out + i, fma(fma(a - pivot, rstd, minus), f0, o0),
                   fma(fma(b - pivot, rstd, minus), f1, o1), past);
      },
      [&](int64_t i, int lanes) {
        const Vec y = fma(load_any(row + i, lanes) - pivot, rstd, minus);
        store_any(out + i, lanes, fma(y, load(factor + i), load(offset + i)));
      });
}

template <typename T, bool kInject>
void residual_row(const LayerNormParams& p, int64_t b, int64_t s, bool streams, Scratch& scratch) {
  ResidualRow<T, kInject> row;
  row.x = row_of<T>(p.x, b, s);
  row.residual = row_of<T>(p.residual, b, s);
  row.inject = kInject ? row_of<T>(p.inject, b, s) : nullptr;
  row.gate = scratch.gate();
  row.inject_scale = scratch.inject_scale();
  row.residual_out = row_to_write<T>(p.residual_out, b, s);
  row.n = p.width;
  row.past = streams && starts_line(row.residual_out);
  row.row = scratch.row();
  if constexpr (std::is_same_v<T, float>) {
    // Not rounded, so it serves as the row itself, if it stays in the cache.
    if (!row.past) row.row = row.residual_out;
  }
  const Moments moments = row.compute();
  T* const out = row_to_write<T>(p.out, b, s);
  normalise(row.row, moments, p.width, p.eps, scratch.factor(), scratch.offset(), out,
            streams && starts_line(out));
}

template <typename T>
void plain_row(const LayerNormParams& p, int64_t b, int64_t s, bool streams, Scratch& scratch) {
  const T* x = row_of<T>(p.x, b, s);
  // The first element is a good pivot mostly, and one that proves bad is replaced.
  Moments moments = row_moments(x, p.width, to_float(x[0]));
  if (moments.cancelled()) moments = row_moments(x, p.width, moments.pivot + moments.rest);
  T* const out = row_to_write<T>(p.out, b, s);
  normalise(x, moments, p.width, p.eps, scratch.factor(), scratch.offset(), out,
            streams && starts_line(out));
}

// Whether the outputs are large, and none takes the place of an input.
bool streams_results(const LayerNormParams& p) {
  for (const void* in : {p.x.data, p.residual.data, p.inject.data}) {
    if (in != nullptr && (in == p.out.data || in == p.residual_out.data)) return false;
  }
  const int64_t outputs = p.residual_out.data == nullptr ? 1 : 2;
  return worth_streaming(outputs * p.batch * p.rows * p.width * size_of(p.dtype));
}

template <typename T, bool kResidual>
void run(const LayerNormParams& p) {
  constexpr int64_t kElements = 16384;  // of a thread at least
  const int64_t grain = std::max<int64_t>(1, kElements / p.width);
  const bool per_sample =
      p.scale.batch_stride != 0 || p.shift.batch_stride != 0 || p.gate.batch_stride != 0;
  const bool streams = streams_results(p);
  parallel_for(0, p.batch * p.rows, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(p.width);
    int64_t prepared = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.rows;
      const int64_t s = i % p.rows;
      if (prepared < 0 || (per_sample && prepared != b)) {
        prepare_sample<T, kResidual>(p, b, scratch);
        prepared = b;
      }
      if constexpr (!kResidual) {
        plain_row<T>(p, b, s, streams, scratch);
      } else if (p.inject.data != nullptr) {
        residual_row<T, true>(p, b, s, streams, scratch);
      } else {
        residual_row<T, false>(p, b, s, streams, scratch);
      }
    }
    end_streaming(streams);
  });
}

}  // namespace

void layer_norm_cpu(const LayerNormParams& p) {
  dispatch_dtype("layer_norm", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.residual.data != nullptr) {
      run<T, true>(p);
    } else {
      run<T, false>(p);
    }
  });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
