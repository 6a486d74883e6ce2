#include <algorithm>
#include <cmath>

#include "cpu_check.h"
#include "kernels/group_norm_apply/group_norm_apply.h"
#include "kernels/group_norm_stats/group_norm_stats.h"
#include "kernels/layer_norm/layer_norm.h"

namespace accelrt::guarded {
namespace {

enum class Layout { kPlanar, kChannelsLast };

struct GroupNormCase {
  int64_t images, channels, channels2, height, width, groups;
  Layout x, x2, out;
  int64_t frames = 1;
  int64_t gap = 0;        // after each row of pixels
  bool tables = true;     // add, weight, bias, scale, shift
  bool in_place = false;  // out is x
};

constexpr Layout kPlanar = Layout::kPlanar;
constexpr Layout kLast = Layout::kChannelsLast;

const GroupNormCase kGroupNorms[] = {
    {1, 1, 0, 1, 1, 1, kLast, kLast, kLast},
    {1, 3, 0, 1, 1, 3, kPlanar, kPlanar, kPlanar},
    {2, 7, 0, 2, 3, 7, kLast, kLast, kLast, 1, 0, false},
    {1, 8, 0, 3, 5, 2, kLast, kLast, kLast, 1, 3},
    {2, 15, 0, 1, 9, 3, kLast, kLast, kLast, 2},
    {1, 16, 0, 9, 1, 4, kLast, kLast, kLast, 1, 0, true, true},
    {1, 18, 0, 4, 4, 6, kLast, kLast, kLast, 1, 2, true, true},
    {2, 31, 0, 2, 5, 1, kLast, kLast, kLast},
    {1, 33, 0, 3, 3, 11, kLast, kLast, kLast, 1, 0, false},
    {1, 64, 0, 2, 7, 32, kLast, kLast, kLast},
    {1, 70, 0, 5, 3, 5, kLast, kLast, kLast, 1, 1},
    {2, 6, 0, 3, 5, 3, kPlanar, kPlanar, kPlanar},
    {1, 4, 0, 4, 8, 2, kPlanar, kPlanar, kPlanar, 1, 0, true, true},
    {2, 5, 0, 3, 17, 1, kPlanar, kPlanar, kPlanar, 2, 3},
    {1, 9, 0, 3, 11, 3, kPlanar, kPlanar, kLast, 1, 1},
    {1, 20, 0, 5, 14, 4, kLast, kLast, kPlanar, 1, 1},
    // Two sources, of which a group may have channels.
    {1, 3, 5, 2, 3, 2, kLast, kLast, kLast},
    {2, 17, 15, 3, 4, 8, kLast, kLast, kLast, 2, 0},
    {1, 33, 31, 2, 5, 4, kLast, kLast, kLast, 1, 1, false},
    {1, 40, 32, 3, 3, 9, kLast, kLast, kLast, 1, 2},
    {1, 7, 9, 3, 5, 4, kPlanar, kPlanar, kPlanar},
    {2, 7, 9, 3, 5, 4, kPlanar, kLast, kLast, 1, 1},
    {1, 5, 1, 1, 23, 2, kLast, kPlanar, kPlanar},
    // Several pieces of work.
    {1, 36, 0, 31, 33, 4, kLast, kLast, kLast},
    {1, 2, 1, 190, 181, 3, kPlanar, kPlanar, kPlanar},
};

// [N, C, H, W] in memory as its layout has it.
class Images {
 public:
  Images(const GroupNormCase& c, int64_t channels, Layout layout)
      : c_(c), channels_(channels), last_(layout == Layout::kChannelsLast) {}
  int64_t count() const { return c_.images * channels_ * c_.height * c_.width; }
  size_t at(int64_t n, int64_t channel, int64_t y, int64_t x) const {
    const int64_t index = last_ ? ((n * c_.height + y) * c_.width + x) * channels_ + channel
                                : ((n * channels_ + channel) * c_.height + y) * c_.width + x;
    return static_cast<size_t>(index);
  }
  std::vector<Axis> axes() const {
    if (last_) return {{c_.images}, {c_.height, c_.gap}, {c_.width}, {channels_}};
    return {{c_.images}, {channels_}, {c_.height, c_.gap}, {c_.width}};
  }
  TensorView view(const Tensor& t, DType dtype) const {
    TensorView v;
    v.data = t.data();
    v.dtype = dtype;
    v.ndim = 4;
    const int64_t sizes[] = {c_.images, channels_, c_.height, c_.width};
    const int order[2][4] = {{0, 1, 2, 3}, {0, 3, 1, 2}};
    for (int d = 0; d < 4; ++d) {
      v.size[d] = sizes[d];
      v.stride[d] = t.stride(order[last_][d]);
    }
    return v;
  }

 private:
  const GroupNormCase& c_;
  int64_t channels_;
  bool last_;
};

struct GroupNormTruth {
  Values stats;  // [N / frames, G, 3]
  Values out;
};

// Of the values at(n, channel, y, x) of both sources, and tables of [N, C].
template <typename At, typename To>
GroupNormTruth normalised(const GroupNormCase& c, const At& at, const Values* tables, bool silu,
                          double eps, const To& to) {
  const int64_t channels = c.channels + c.channels2;
  const int64_t each = channels / c.groups;
  GroupNormTruth truth;
  truth.out.resize(static_cast<size_t>(c.images * channels * c.height * c.width));
  for (int64_t clip = 0; clip < c.images / c.frames; ++clip) {
    for (int64_t group = 0; group < c.groups; ++group) {
      const auto for_all = [&](const auto& fn) {
        for (int64_t n = clip * c.frames; n < (clip + 1) * c.frames; ++n) {
          for (int64_t channel = group * each; channel < (group + 1) * each; ++channel) {
            const auto table = [&](int i, double otherwise) {
              return c.tables ? tables[i][n * channels + channel] : otherwise;
            };
            for (int64_t pixel = 0; pixel < c.height * c.width; ++pixel) {
              const int64_t y = pixel / c.width;
              const int64_t x = pixel % c.width;
              fn(at(n, channel, y, x) + table(0, 0), n, channel, y, x, table);
            }
          }
        }
      };
      const double count = static_cast<double>(c.frames * each * c.height * c.width);
      double mean = 0;
      for_all([&](double v, auto...) { mean += v / count; });
      double squares = 0;
      for_all([&](double v, auto...) { squares += (v - mean) * (v - mean); });
      for (const double v : {count, mean, squares}) truth.stats.push_back(static_cast<float>(v));
      const double rstd = 1 / std::sqrt(squares / count + eps);
      for_all([&](double v, int64_t n, int64_t channel, int64_t y, int64_t x, const auto& table) {
        double result = (v - mean) * rstd * table(1, 1) + table(2, 0);
        result = result * (1 + table(3, 0)) + table(4, 0);
        truth.out[to(n, channel, y, x)] =
            static_cast<float>(silu ? result / (1 + std::exp(-result)) : result);
      });
    }
  }
  return truth;
}

void check_group_norm(const GroupNormCase& c, bool silu) {
  constexpr float kEps = 1e-3f;
  const int64_t channels = c.channels + c.channels2;
  const Images first(c, c.channels, c.x);
  const Images second(c, c.channels2, c.x2);
  const Images result(c, channels, c.in_place ? c.x : c.out);
  const Values xs = eighths(first.count());
  const Values x2s = eighths(second.count());
  // add, weight, bias, scale, shift: [N, C]; weight and bias have one row.
  Values tables[5];
  for (Values& table : tables) table = eighths(c.images * channels);
  for (int64_t n = 1; n < c.images; ++n) {
    for (const int i : {1, 2}) {
      std::copy_n(tables[i].begin(), channels, tables[i].begin() + n * channels);
    }
  }
  const auto at = [&](int64_t n, int64_t channel, int64_t y, int64_t x) {
    return channel < c.channels ? xs[first.at(n, channel, y, x)]
                                : x2s[second.at(n, channel - c.channels, y, x)];
  };
  const auto to = [&](auto... index) { return result.at(index...); };
  const GroupNormTruth truth = normalised(c, at, tables, silu, kEps, to);
  for (const DType dtype : kDTypes) {
    std::ostringstream text;
    text << "group_norm " << name_of(dtype) << " [" << c.images << ", " << c.channels << " + "
         << c.channels2 << ", " << c.height << ", " << c.width << "], " << c.groups << " groups";
    set_case(text.str());
    // What both passes read.
    struct Sources {
      Sources(const GroupNormCase& c, const Values& xs, const Values& x2s, const Values& adds,
              const Images& first, const Images& second, DType dtype, Side side)
          : x(dtype, side, first.axes()),
            x2(dtype, side, second.axes(), x2s),
            add(dtype, side, {{c.images, 3}, {c.channels + c.channels2}}, adds) {
        x.set(xs);
        if (!c.in_place) x.forbid_writing();
        if (c.channels2 > 0) x2_view = second.view(x2, dtype);
        if (!c.tables) return;
        add_view.emplace();
        add_view->data = add.data();
        add_view->dtype = dtype;
        add_view->ndim = 2;
        for (int d = 0; d < 2; ++d) {
          add_view->size[d] = d == 0 ? c.images : c.channels + c.channels2;
          add_view->stride[d] = add.stride(d);
        }
      }
      Tensor x;
      Input x2, add;
      OptionalView x2_view, add_view;
    };
    const std::vector<Axis> stats_axes = {{c.images / c.frames}, {c.groups}, {3}};
    const auto collect = [&](auto kernel, Side side) {
      const Sources from(c, xs, x2s, tables[0], first, second, dtype, side);
      const Tensor stats(DType::kFloat32, side, stats_axes);
      GroupNormStatsParams p;
      p.source = make_group_norm_source("check", first.view(from.x, dtype), from.x2_view,
                                        from.add_view, c.groups, c.frames);
      p.out = static_cast<float*>(stats.data());
      kernel(p);
      stats.check(truth.stats, 1e-5f, 1e-5f);
    };
    const auto apply = [&](auto kernel, Side side) {
      const Sources from(c, xs, x2s, tables[0], first, second, dtype, side);
      const Tensor other(dtype, side, result.axes());
      const Tensor& out = c.in_place ? from.x : other;
      const Input stats(DType::kFloat32, side, stats_axes, truth.stats);
      const Input weight(dtype, side, {{channels}}, tables[1]);
      const Input bias(dtype, side, {{channels}}, tables[2]);
      const Input scale(dtype, side, {{c.images, 1}, {channels}}, tables[3]);
      const Input shift(dtype, side, {{c.images, 2}, {channels}}, tables[4]);
      const TensorView target = result.view(out, dtype);
      GroupNormApplyParams p;
      p.source = make_group_norm_source("check", first.view(from.x, dtype), from.x2_view,
                                        from.add_view, c.groups, c.frames, &target, &p.out_stride);
      p.stats = static_cast<const float*>(stats.data());
      if (c.tables) {
        p.weight = {weight.data(), 0, 1};
        p.bias = {bias.data(), 0, 1};
        p.scale = {scale.data(), scale.stride(0), 1};
        p.shift = {shift.data(), shift.stride(0), 1};
      }
      p.eps = kEps;
      p.silu = silu;
      p.out = out.data();
      kernel(p);
      out.check(truth.out, rounding(dtype), rounding(dtype));
    };
    if (!silu) {
      for_forms<GroupNormStatsParams>({ACCELRT_FORM(kAVX2, avx2, group_norm_stats_cpu),
                                       ACCELRT_FORM(kAVX512, avx512, group_norm_stats_cpu)},
                                      dtype, collect);
    }
    for_forms<GroupNormApplyParams>(ACCELRT_FORMS(group_norm_apply_cpu), dtype, apply);
  }
}

struct LayerNormCase {
  int64_t batch, rows, width;
  bool residual = false, inject = false, tables = true;
  bool in_place = false;  // out is x, and residual_out is residual
  int64_t gap = 0;        // after each row
};

const LayerNormCase kLayerNorms[] = {
    {1, 1, 1},
    {1, 2, 2, true},
    {2, 3, 7, false, false, false},
    {2, 3, 8, true, true, true, false, 1},
    {1, 4, 15},
    {1, 2, 16, true, false, false},
    {2, 1, 17, true, true, true, true},
    {1, 3, 31, false, false, true, true, 3},
    {1, 3, 32, true, true},
    {1, 3, 33, true, false, true, true},
    {2, 2, 47},
    {1, 2, 63, true, true, false},
    {1, 2, 64, true},
    {1, 2, 65, false, false, true, false, 5},
    {3, 5, 111, true, true, true, false, 2},
    {1, 1, 1153, true, true},
};

void check_layer_norm(const LayerNormCase& c) {
  constexpr float kEps = 1e-3f;
  const auto numbers = [&] { return eighths(c.batch * c.rows * c.width); };
  const auto vectors = [&](int64_t count) { return eighths(count * c.width); };
  const Values xs = numbers(), residuals = numbers(), injects = numbers();
  const Values gates = vectors(c.batch), scales = vectors(c.batch), shifts = vectors(c.batch);
  const Values weights = vectors(1), biases = vectors(1), inject_scales = vectors(1);
  Values sums = xs;
  Values truth(sums.size());
  for (int64_t row = 0; row < c.batch * c.rows; ++row) {
    float* const r = sums.data() + row * c.width;
    const int64_t sample = row / c.rows * c.width;
    double mean = 0;
    for (int64_t i = 0; i < c.width; ++i) {
      const int64_t at = row * c.width + i;
      if (c.residual) r[i] = residuals[at] + (c.tables ? gates[sample + i] : 1) * r[i];
      if (c.inject) r[i] += (c.tables ? inject_scales[i] : 1) * injects[at];
      mean += r[i] / static_cast<double>(c.width);
    }
    double squares = 0;
    for (int64_t i = 0; i < c.width; ++i) squares += (r[i] - mean) * (r[i] - mean);
    const double rstd = 1 / std::sqrt(squares / static_cast<double>(c.width) + kEps);
    for (int64_t i = 0; i < c.width; ++i) {
      double y = (r[i] - mean) * rstd;
      if (c.tables) {
        y = (y * weights[i] + biases[i]) * (1 + scales[sample + i]) + shifts[sample + i];
      }
      truth[row * c.width + i] = static_cast<float>(y);
    }
  }
  for (const DType dtype : kDTypes) {
    std::ostringstream text;
    text << "layer_norm " << name_of(dtype) << " [" << c.batch << ", " << c.rows << ", " << c.width
         << "], residual " << c.residual << ", inject " << c.inject;
    set_case(text.str());
    const auto run = [&](auto kernel, Side side) {
      const std::vector<Axis> axes = {{c.batch, 2 * c.gap}, {c.rows, c.gap}, {c.width}};
      Tensor x(dtype, side, axes);
      Tensor residual(dtype, side, axes);
      x.set(xs);
      residual.set(residuals);
      if (!c.in_place) x.forbid_writing();
      if (!c.in_place) residual.forbid_writing();
      const Input inject(dtype, side, axes, injects);
      const Tensor own_out(dtype, side, axes);
      const Tensor own_sums(dtype, side, axes);
      const Tensor& out = c.in_place ? x : own_out;
      const Tensor& residual_out = c.in_place ? residual : own_sums;
      const Input gate(dtype, side, {{c.batch, 1}, {c.width}}, gates);
      const Input scale(dtype, side, {{c.batch, 1}, {c.width}}, scales);
      const Input shift(dtype, side, {{c.batch}, {c.width}}, shifts);
      const Input weight(dtype, side, {{c.width}}, weights);
      const Input bias(dtype, side, {{c.width}}, biases);
      const Input inject_scale(dtype, side, {{c.width}}, inject_scales);
      const auto rows = [](const Tensor& t) {
        return LayerNormParams::Rows{t.data(), t.stride(0), t.stride(1)};
      };
      LayerNormParams p;
      p.batch = c.batch;
      p.rows = c.rows;
      p.width = c.width;
      p.x = rows(x);
      p.out = rows(out);
      if (c.residual) p.residual = rows(residual);
      if (c.residual) p.residual_out = rows(residual_out);
      if (c.inject) p.inject = rows(inject);
      if (c.tables) {
        p.gate = {gate.data(), gate.stride(0)};
        p.scale = {scale.data(), scale.stride(0)};
        p.shift = {shift.data(), shift.stride(0)};
        p.weight = weight.data();
        p.bias = bias.data();
        p.inject_scale = inject_scale.data();
      }
      p.eps = kEps;
      p.dtype = dtype;
      kernel(p);
      out.check(truth, rounding(dtype), rounding(dtype));
      if (c.residual) residual_out.check(sums);
    };
    for_forms<LayerNormParams>(ACCELRT_FORMS(layer_norm_cpu), dtype, run);
  }
}

}  // namespace

void check_norms() {
  for (const GroupNormCase& c : kGroupNorms) {
    for (const bool silu : {false, true}) check_group_norm(c, silu);
  }
  for (const LayerNormCase& c : kLayerNorms) check_layer_norm(c);
}

}  // namespace accelrt::guarded
