#include <cmath>

#include "cpu_check.h"
#include "kernels/linear/linear.h"

namespace accelrt::guarded {
namespace {

struct Case {
  int64_t rows, columns, depth;
  LinearEpilogue epilogue = LinearEpilogue::kNone;
  int64_t x_gap = 0, weight_gap = 0, out_gap = 0;
  int64_t rows_per_sample = 0;  // 0: no gate
  bool bias = true;
  bool tiles = false;  // for the tile registers alone
};

constexpr auto kNone = LinearEpilogue::kNone;
constexpr auto kResidual = LinearEpilogue::kGatedResidual;

const Case kCases[] = {
    {1, 1, 1},
    {2, 3, 0},
    {1, 7, 2},
    // Rows beside the blocks; depths beside the vectors and the pairs; columns beside the panels.
    {3, 8, 15},
    {4, 15, 16},
    {5, 16, 17},
    {6, 17, 31, kNone, 0, 0, 0, 0, false},
    {7, 31, 32},
    {8, 32, 33},
    {9, 33, 63},
    {11, 47, 64},
    {12, 48, 65},
    {13, 64, 111},
    {16, 65, 7},
    {17, 5, 129},
    {25, 96, 31},
    {33, 40, 128},
    {49, 33, 800},  // more than a part of K
    {721, 2, 3},    // and than a piece of rows
    {1450, 1, 33},
    {31, 270, 36},  // panels that go together
    {14, 3, 512},   // rows whose distance is a power of two
    {14, 3, 1024},
    {13, 1, 44000},                                   // few rows of which are widened at a time
    {530, 3, 8200, kNone, 0, 0, 0, 0, true, true},    // the weights are packed first
    {31, 33, 140000, kNone, 0, 0, 0, 0, true, true},  // in several turns
    // Views; the last row ends where the memory does.
    {5, 18, 19, kNone, 1, 0, 0},
    {5, 18, 19, kNone, 0, 3, 0},
    {5, 18, 19, kNone, 0, 0, 2},
    {27, 35, 70, kNone, 5, 6, 7},
    {14, 3, 24, kNone, 1000, 0, 0},
    {6, 17, 31, kResidual},
    {12, 33, 32, kResidual, 0, 0, 3, 4},
    {36, 70, 45, kResidual, 1, 2, 3, 9, false},
    {40, 64, 32, kResidual, 0, 0, 0, 20},
    {7, 19, 111, LinearEpilogue::kGELU, 1},
    {32, 64, 64, LinearEpilogue::kGELU},
    {13, 33, 31, LinearEpilogue::kGELUTanh, 0, 0, 1},
    {34, 32, 64, LinearEpilogue::kGELUTanh},
    {3, 1, 5, LinearEpilogue::kGEGLU},
    {5, 7, 33, LinearEpilogue::kGEGLU},
    {9, 15, 31, LinearEpilogue::kGEGLU, 0, 0, 0, 0, false},
    {17, 24, 90, LinearEpilogue::kGEGLU, 1, 1, 1},
    {33, 48, 64, LinearEpilogue::kGEGLU},
    {13, 17, 30, LinearEpilogue::kGEGLUTanh},
    {35, 16, 33, LinearEpilogue::kGEGLUTanh, 0, 0, 9},
};

double gelu(double x, bool by_tanh) {
  if (!by_tanh) return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
  return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

// What a case reads, without gaps; `before` is what out holds.
struct Given {
  Values x, weight, bias, gate, before;
};

Values product(const Case& c, const Given& given) {
  Values out;
  const auto sum = [&](int64_t row, int64_t of) {
    float y = c.bias ? given.bias[of] : 0.f;
    const float* const left = given.x.data() + row * c.depth;
    const float* const right = given.weight.data() + of * c.depth;
    for (int64_t k = 0; k < c.depth; ++k) y += left[k] * right[k];
    return y;
  };
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t column = 0; column < c.columns; ++column) {
      double y = sum(row, column);
      switch (c.epilogue) {
        case LinearEpilogue::kNone: break;
        case LinearEpilogue::kGELU: y = gelu(y, false); break;
        case LinearEpilogue::kGELUTanh: y = gelu(y, true); break;
        case LinearEpilogue::kGatedResidual: {
          const int64_t sample = c.rows_per_sample == 0 ? 0 : row / c.rows_per_sample;
          const float gate = c.rows_per_sample == 0 ? 1 : given.gate[sample * c.columns + column];
          y = gate * y + given.before[row * c.columns + column];
          break;
        }
        case LinearEpilogue::kGEGLU: y *= gelu(sum(row, c.columns + column), false); break;
        case LinearEpilogue::kGEGLUTanh: y *= gelu(sum(row, c.columns + column), true); break;
      }
      out.push_back(static_cast<float>(y));
    }
  }
  return out;
}

void check(const Case& c) {
  const int64_t weight_rows = is_geglu(c.epilogue) ? 2 * c.columns : c.columns;
  const int64_t samples = c.rows_per_sample == 0 ? 1 : c.rows / c.rows_per_sample;
  const Given given{eighths(c.rows * c.depth), eighths(weight_rows * c.depth), eighths(weight_rows),
                    eighths(samples * c.columns), eighths(c.rows * c.columns)};
  const Values truth = product(c, given);
  const bool exact = c.epilogue == kNone || c.epilogue == kResidual;
  for (const DType dtype : kDTypes) {
    std::ostringstream text;
    text << "linear " << name_of(dtype) << " [" << c.rows << ", " << c.depth << "] by ["
         << weight_rows << ", " << c.depth << "], epilogue " << static_cast<int>(c.epilogue);
    set_case(text.str());
    const auto run = [&](auto kernel, Side side) {
      const Input x(dtype, side, {{c.rows, c.x_gap}, {c.depth}}, given.x);
      const Input weight(dtype, side, {{weight_rows, c.weight_gap}, {c.depth}}, given.weight);
      const Input bias(dtype, side, {{weight_rows}}, given.bias);
      const Input gate(dtype, side, {{samples, 1}, {c.columns}}, given.gate);
      Tensor out(dtype, side, {{c.rows, c.out_gap}, {c.columns}});
      if (c.epilogue == kResidual) out.set(given.before);
      LinearParams p;
      // What has no elements may have no address.
      p.x = c.depth == 0 ? nullptr : x.data();
      p.weight = c.depth == 0 ? nullptr : weight.data();
      p.bias = c.bias ? bias.data() : nullptr;
      p.out = out.data();
      p.x_stride = x.stride(0);
      p.weight_stride = weight.stride(0);
      p.out_stride = out.stride(0);
      p.rows = c.rows;
      p.columns = c.columns;
      p.depth = c.depth;
      p.epilogue = c.epilogue;
      if (c.rows_per_sample > 0) {
        p.gate = gate.data();
        p.gate_stride = gate.stride(0);
        p.rows_per_sample = c.rows_per_sample;
      }
      p.dtype = dtype;
      kernel(p);
      out.check(truth, exact ? 0.f : rounding(dtype), exact ? 0.f : 1e-5f);
    };
    if (c.tiles) {
      for_forms<LinearParams>(ACCELRT_TILES_ALONE(linear_cpu), dtype, run);
    } else {
      for_forms<LinearParams>(ACCELRT_FORMS_WITH_TILES(linear_cpu), dtype, run);
    }
  }
}

}  // namespace

void check_linear() {
  for (const Case& c : kCases) check(c);
}

}  // namespace accelrt::guarded
