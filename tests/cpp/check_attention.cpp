#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_check.h"
#include "kernels/attention/attention.h"

namespace accelrt::guarded {
namespace {

enum class Bias { kNone, kShared, kOfQueries };

struct Case {
  int64_t batch, heads, queries, keys;
  int dim;
  Bias bias = Bias::kNone;
  double scale = 1;
  int64_t gap = 0;        // after each token
  bool in_place = false;  // out is q
};

const Case kCases[] = {
    {1, 1, 1, 1, 1},
    {1, 2, 3, 2, 2},
    {2, 1, 2, 7, 3, Bias::kShared},
    {1, 2, 4, 8, 7},
    {1, 3, 5, 15, 8, Bias::kOfQueries},
    {2, 2, 7, 16, 15},
    {1, 2, 8, 17, 16},
    {1, 2, 9, 31, 17, Bias::kShared},
    {1, 1, 12, 32, 24, Bias::kNone, 1, 1},
    {1, 2, 13, 33, 31, Bias::kOfQueries, 0.5},
    {1, 2, 16, 47, 32},
    {1, 1, 17, 48, 33, Bias::kNone, -0.3},
    {2, 1, 31, 49, 40, Bias::kShared, -0.2, 3},
    {1, 2, 33, 64, 40, Bias::kNone, 0.3, 0, true},
    {1, 1, 32, 65, 64},
    {1, 1, 65, 63, 72, Bias::kOfQueries, 0.2, 5},
    {1, 2, 20, 33, 80},
    {1, 1, 9, 66, 100, Bias::kNone, 0.1, 1, true},
    {1, 1, 5, 40, 128},
    {1, 1, 5, 300, 129, Bias::kShared, 0.1},
    {1, 1, 3, 530, 24, Bias::kOfQueries, 0.3},
    {1, 1, 18, 275, 255},
    {1, 1, 4, 90, 256, Bias::kOfQueries, 0.05},
    {1, 1, 530, 5, 9},
};

// What a case reads, without gaps: [batch, tokens, heads, dim]; bias: [batch, queries or 1, keys].
struct Given {
  Values q, k, v, bias;
};

Values attended(const Case& c, const Given& given) {
  Values out(given.q.size());
  const int64_t row = c.heads * c.dim;
  std::vector<double> weights(static_cast<size_t>(c.keys));
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t i = 0; i < c.queries; ++i) {
        const int64_t at = (n * c.queries + i) * row + h * c.dim;
        double top = -std::numeric_limits<double>::infinity();
        for (int64_t j = 0; j < c.keys; ++j) {
          const float* const key = given.k.data() + (n * c.keys + j) * row + h * c.dim;
          double score = 0;
          for (int d = 0; d < c.dim; ++d) score += given.q[at + d] * key[d];
          score *= c.scale;
          if (c.bias == Bias::kShared) score += given.bias[n * c.keys + j];
          if (c.bias == Bias::kOfQueries) score += given.bias[(n * c.queries + i) * c.keys + j];
          weights[j] = score;
          top = std::max(top, score);
        }
        double sum = 0;
        for (double& weight : weights) {
          weight = std::isinf(top) ? 0 : std::exp(weight - top);
          sum += weight;
        }
        for (int d = 0; d < c.dim; ++d) {
          double y = 0;
          for (int64_t j = 0; j < c.keys; ++j) {
            y += weights[j] * given.v[(n * c.keys + j) * row + h * c.dim + d];
          }
          out[at + d] = static_cast<float>(sum == 0 ? 0 : y / sum);
        }
      }
    }
  }
  return out;
}

void check(const Case& c) {
  const int64_t bias_rows = c.bias == Bias::kOfQueries ? c.queries : 1;
  Given given{eighths(c.batch * c.queries * c.heads * c.dim),
              eighths(c.batch * c.keys * c.heads * c.dim),
              eighths(c.batch * c.keys * c.heads * c.dim), eighths(c.batch * bias_rows * c.keys)};
  if (c.bias != Bias::kNone) {  // the first row sees nothing, others not their first key
    for (int64_t j = 0; j < c.keys; ++j) given.bias[j] = -INFINITY;
    for (int64_t i = 1; i < c.batch * bias_rows; ++i) given.bias[i * c.keys] = -INFINITY;
  }
  const Values truth = attended(c, given);
  for (const DType dtype : kDTypes) {
    std::ostringstream text;
    text << "attention " << name_of(dtype) << " [" << c.batch << ", " << c.queries << ", "
         << c.heads << ", " << c.dim << "] by " << c.keys << " keys, scale " << c.scale << ", bias "
         << static_cast<int>(c.bias) << (c.in_place ? ", in place" : "");
    set_case(text.str());
    for_forms<AttentionParams>(
        ACCELRT_FORMS_WITH_TILES(attention_cpu), dtype, [&](auto kernel, Side side) {
          Tensor q(dtype, side, {{c.batch}, {c.queries, c.gap}, {c.heads}, {c.dim}});
          q.set(given.q);
          if (!c.in_place) q.forbid_writing();
          const Input k(dtype, side, {{c.batch}, {c.keys, c.gap}, {c.heads}, {c.dim}}, given.k);
          const Input v(dtype, side, {{c.batch}, {c.keys, 2 * c.gap}, {c.heads}, {c.dim}}, given.v);
          const Input bias(dtype, side, {{c.batch}, {bias_rows}, {c.keys}}, given.bias);
          const Tensor other(dtype, side, {{c.batch}, {c.queries, c.gap}, {c.heads}, {c.dim}});
          const Tensor& out = c.in_place ? q : other;
          const auto strides = [](const Tensor& t) {
            return TokenStrides{t.stride(0), t.stride(1), t.stride(2)};
          };
          AttentionParams p;
          p.q = q.data();
          p.k = k.data();
          p.v = v.data();
          p.out = out.data();
          p.q_stride = strides(q);
          p.k_stride = strides(k);
          p.v_stride = strides(v);
          p.out_stride = strides(out);
          if (c.bias != Bias::kNone) {
            p.bias = bias.data();
            p.bias_stride = {bias.stride(0), bias_rows == 1 ? 0 : bias.stride(1), 0};
          }
          p.batch = c.batch;
          p.heads = c.heads;
          p.queries = c.queries;
          p.keys = c.keys;
          p.head_dim = c.dim;
          p.scale = c.scale;
          p.dtype = dtype;
          kernel(p);
          out.check(truth, 0.f, rounding(dtype));
        });
  }
}

}  // namespace

void check_attention() {
  for (const Case& c : kCases) check(c);
}

}  // namespace accelrt::guarded
