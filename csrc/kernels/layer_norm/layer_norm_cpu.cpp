// A row stays in the first-level cache between its passes, so memory is read once. Everything
// that is one vector per sample is brought to float32 once per sample, as the factor and the
// offset of a single multiply-add.
#include <algorithm>
#include <cmath>
#include <memory>

#include "accelrt/dispatch.h"
#include "accelrt/parallel.h"
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
Vec load_or(const T* p, int64_t i, int lanes, float otherwise) {
  return p == nullptr ? Vec(otherwise) : load_any(p + i, lanes);
}

// The float32 vectors of one thread.
struct Scratch {
  explicit Scratch(int64_t width) : stride((width + kLanes - 1) / kLanes * kLanes) {
    memory.reset(new float[kCount * stride]);
  }
  float* factor() { return memory.get(); }
  float* offset() { return memory.get() + stride; }
  float* gate() { return memory.get() + 2 * stride; }
  float* inject_scale() { return memory.get() + 3 * stride; }
  float* row() { return memory.get() + 4 * stride; }

  static constexpr int kCount = 5;
  int64_t stride;  // padded, so that the last vector may be stored in full
  std::unique_ptr<float[]> memory;
};

template <typename T, bool kResidual>
void prepare_sample(const LayerNormParams& p, int64_t b, Scratch& scratch) {
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  const T* scale = vector_of<T>(p.scale, b);
  const T* shift = vector_of<T>(p.shift, b);
  for_lanes(p.width, [&](int64_t i, int lanes) {
    const Vec one_plus = Vec(1.f) + load_or(scale, i, lanes, 0.f);
    store(scratch.factor() + i, load_or(weight, i, lanes, 1.f) * one_plus);
    store(scratch.offset() + i,
          fma(load_or(bias, i, lanes, 0.f), one_plus, load_or(shift, i, lanes, 0.f)));
  });
  if constexpr (kResidual) {
    const T* gate = vector_of<T>(p.gate, b);
    const T* inject_scale = static_cast<const T*>(p.inject_scale);
    for_lanes(p.width, [&](int64_t i, int lanes) {
      store(scratch.gate() + i, load_or(gate, i, lanes, 1.f));
      store(scratch.inject_scale() + i, load_or(inject_scale, i, lanes, 1.f));
    });
  }
}

// Fills scratch.row() with r, stores it rounded, and returns its sum.
template <typename T, bool kInject>
float add_residual(const LayerNormParams& p, int64_t b, int64_t s, Scratch& scratch) {
  const T* x = row_of<T>(p.x, b, s);
  const T* residual = row_of<T>(p.residual, b, s);
  const T* inject = row_of<T>(p.inject, kInject ? b : 0, kInject ? s : 0);
  T* residual_out = row_to_write<T>(p.residual_out, b, s);
  const float* gate = scratch.gate();
  const float* inject_scale = scratch.inject_scale();
  float* row = scratch.row();
  Vec total(0.f);
  for_lanes(p.width, [&](int64_t i, int lanes) {
    Vec r = load_any(residual + i, lanes);
    // The lanes past the end stay zero: x and inject read as zero there.
    r = fma(load(gate + i), load_any(x + i, lanes), r);
    if constexpr (kInject) { r = fma(load(inject_scale + i), load_any(inject + i, lanes), r); }
    store(row + i, r);
    store_any(residual_out + i, lanes, r);
    total += r;
  });
  return sum(total);
}

template <typename T>
float sum_of(const T* x, int64_t n) {
  Vec total[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) total[k] += load(x + i + k * kLanes);
  }
  for_lanes(n - i, [&](int64_t at, int lanes) { total[0] += load_any(x + i + at, lanes); });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// out = (row - mean) / std * factor + offset. The deviations are taken from the rounded mean
// and their own mean is removed after, so that an offset of many standard deviations costs
// no accuracy.
template <typename S, typename T>
void normalise(const S* row, float total, int64_t n, float eps, const float* factor,
               const float* offset, T* out) {
  const float mean = total / static_cast<float>(n);
  Vec first[2] = {Vec(0.f), Vec(0.f)};
  Vec second[2] = {Vec(0.f), Vec(0.f)};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int k = 0; k < 2; ++k) {
      const Vec d = load(row + i + k * kLanes) - Vec(mean);
      first[k] += d;
      second[k] = fma(d, d, second[k]);
    }
  }
  for_lanes(n - i, [&](int64_t at, int lanes) {
    const Vec d = load_any(row + i + at, lanes, mean) - Vec(mean);
    first[0] += d;
    second[0] = fma(d, d, second[0]);
  });
  const float rest = sum(first[0] + first[1]) / static_cast<float>(n);
  const float variance =
      std::max(sum(second[0] + second[1]) / static_cast<float>(n) - rest * rest, 0.f);
  const float rstd = 1.f / std::sqrt(variance + eps);
  const Vec minus(-rest * rstd);
  for_lanes(n, [&](int64_t at, int lanes) {
    const Vec d = load_any(row + at, lanes) - Vec(mean);
    const Vec y = fma(d, Vec(rstd), minus);
    store_any(out + at, lanes, fma(y, load(factor + at), load(offset + at)));
  });
}

template <typename T, bool kResidual>
void run(const LayerNormParams& p) {
  constexpr int64_t kElements = 16384;  // of a thread at least
  const int64_t grain = std::max<int64_t>(1, kElements / p.width);
  const bool per_sample =
      p.scale.batch_stride != 0 || p.shift.batch_stride != 0 || p.gate.batch_stride != 0;
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
      T* out = row_to_write<T>(p.out, b, s);
      if constexpr (kResidual) {
        const float total = p.inject.data != nullptr ? add_residual<T, true>(p, b, s, scratch)
                                                     : add_residual<T, false>(p, b, s, scratch);
        normalise(scratch.row(), total, p.width, p.eps, scratch.factor(), scratch.offset(), out);
      } else {
        const T* x = row_of<T>(p.x, b, s);
        normalise(x, sum_of(x, p.width), p.width, p.eps, scratch.factor(), scratch.offset(), out);
      }
    }
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
