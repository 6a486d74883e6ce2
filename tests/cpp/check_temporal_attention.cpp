#include <algorithm>
#include <cmath>

#include "cpu_check.h"
#include "kernels/temporal_attention/temporal_attention.h"

namespace accelrt::guarded {
namespace {

struct Case {
  int64_t batch, pixels;
  int frames, key_frames;
  int64_t heads;
  int dim;
  double scale = 1;
  int64_t gap = 0;        // after each pixel
  bool in_place = false;  // out is q
};

const Case kCases[] = {
    {1, 1, 1, 1, 1, 1},         {1, 2, 2, 3, 1, 2},          {2, 1, 3, 2, 3, 3, 0.5},
    {1, 3, 5, 7, 2, 7, 0.4, 1}, {1, 2, 7, 8, 5, 8},          {1, 3, 8, 9, 3, 15, 0.3, 0, true},
    {2, 2, 9, 15, 2, 16},       {1, 2, 15, 16, 3, 17, -0.2}, {1, 2, 16, 17, 1, 24, 0.3, 5},
    {1, 3, 17, 5, 7, 40, 0.2},  {1, 1, 31, 33, 4, 33, 0.2},  {1, 2, 33, 31, 3, 64, 0.2, 3, true},
    {1, 2, 6, 64, 2, 80, 0.1},  {1, 1, 64, 64, 1, 255, 0.1}, {1, 2, 13, 48, 2, 256, 0.05, 1},
    {1, 1, 64, 1, 21, 10},
};

// [batch, frames, pixels, heads * dim].
Values attended(const Case& c, const Values& q, const Values& k, const Values& v) {
  Values out(q.size());
  const int64_t row = c.heads * c.dim;
  const auto at = [&](int64_t n, int frames, int t, int64_t pixel, int64_t h) {
    return ((n * frames + t) * c.pixels + pixel) * row + h * c.dim;
  };
  std::vector<double> weights(static_cast<size_t>(c.key_frames));
  for (int64_t i = 0; i < c.batch * c.pixels * c.heads * c.frames; ++i) {
    const int t = static_cast<int>(i % c.frames);
    const int64_t h = i / c.frames % c.heads;
    const int64_t pixel = i / c.frames / c.heads % c.pixels;
    const int64_t n = i / c.frames / c.heads / c.pixels;
    const int64_t to = at(n, c.frames, t, pixel, h);
    for (int j = 0; j < c.key_frames; ++j) {
      double score = 0;
      const int64_t key = at(n, c.key_frames, j, pixel, h);
      for (int d = 0; d < c.dim; ++d) score += q[to + d] * k[key + d];
      weights[j] = score * c.scale;
    }
    const double top = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - top);
    for (int d = 0; d < c.dim; ++d) {
      double y = 0;
      for (int j = 0; j < c.key_frames; ++j) {
        y += weights[j] * v[at(n, c.key_frames, j, pixel, h) + d];
      }
      out[to + d] = static_cast<float>(y / sum);
    }
  }
  return out;
}

void check(const Case& c) {
  const int64_t row = c.heads * c.dim;
  const Values qs = eighths(c.batch * c.frames * c.pixels * row);
  const Values ks = eighths(c.batch * c.key_frames * c.pixels * row);
  const Values vs = eighths(c.batch * c.key_frames * c.pixels * row);
  const Values truth = attended(c, qs, ks, vs);
  for (const DType dtype : kDTypes) {
    std::ostringstream text;
    text << "temporal_attention " << name_of(dtype) << " [" << c.batch << ", " << c.frames << ", "
         << c.pixels << ", " << c.heads << " * " << c.dim << "] by " << c.key_frames
         << " frames, scale " << c.scale << (c.in_place ? ", in place" : "");
    set_case(text.str());
    const auto run = [&](auto kernel, Side side) {
      const auto shape = [&](int64_t frames, int64_t gap) {
        return std::vector<Axis>{{c.batch}, {frames}, {c.pixels, gap}, {row}};
      };
      Tensor q(dtype, side, shape(c.frames, c.gap));
      q.set(qs);
      if (!c.in_place) q.forbid_writing();
      const Input k(dtype, side, shape(c.key_frames, 2 * c.gap), ks);
      const Input v(dtype, side, shape(c.key_frames, c.gap), vs);
      const Tensor other(dtype, side, shape(c.frames, 3 * c.gap));
      const Tensor& out = c.in_place ? q : other;
      const auto strides = [](const Tensor& t) {
        return FrameStrides{t.stride(0), t.stride(1), t.stride(2)};
      };
      TemporalAttentionParams p;
      p.q = q.data();
      p.k = k.data();
      p.v = v.data();
      p.out = out.data();
      p.q_stride = strides(q);
      p.k_stride = strides(k);
      p.v_stride = strides(v);
      p.out_stride = strides(out);
      p.batch = c.batch;
      p.pixels = c.pixels;
      p.frames = c.frames;
      p.key_frames = c.key_frames;
      p.heads = c.heads;
      p.head_dim = c.dim;
      p.scale = static_cast<float>(c.scale);
      p.dtype = dtype;
      kernel(p);
      out.check(truth, 0.f, rounding(dtype));
    };
    for_forms<TemporalAttentionParams>(ACCELRT_FORMS(temporal_attention_cpu), dtype, run);
  }
}

}  // namespace

void check_temporal_attention() {
  for (const Case& c : kCases) check(c);
}

}  // namespace accelrt::guarded
