// tile_check <product|linear|conv2d|attention>
//
// The kernels on the tile instructions of AMX against those on their emulation, bit by bit: on the
// processor where it has them, else trapped (see tile_trap.h). `product` compares both with the
// model in double precision. Prints what ran; the exit status is 0 if all agree.
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "accelrt/check.h"
#include "accelrt/parallel.h"
#include "kernels/attention/attention.h"
#include "kernels/conv2d/conv2d.h"
#include "kernels/linear/linear.h"
#include "tile_product.h"
#include "tile_trap.h"

namespace accelrt::tiles {
namespace {

using Values = std::vector<uint16_t>;

std::mt19937 g_random(7);

float normal(float spread = 1.f) { return std::normal_distribution<float>(0.f, spread)(g_random); }

Values random_values(int64_t count, float spread = 1.f) {
  Values values(static_cast<size_t>(count));
  for (uint16_t& x : values) x = from_float<bfloat16>(normal(spread)).bits;
  return values;
}

bool released() {
  unsigned char config[64];
  std::memset(config, 1, sizeof(config));
  asm volatile("sttilecfg %0" : "=m"(config));
  for (const unsigned char byte : config) {
    if (byte != 0) return false;
  }
  return true;
}

// A bfloat16 of any kind but NaN: subnormal, near the smallest normal number, ordinary, large,
// infinite.
uint16_t any_value(int kind) {
  const uint16_t sign = g_random() % 2 ? 0x8000 : 0;
  const uint16_t mantissa = g_random() % 128;
  const int exponents[][2] = {{0, 1}, {1, 3}, {58, 66}, {120, 134}, {180, 254}};
  const auto [low, high] = exponents[kind];
  return sign | static_cast<uint16_t>((low + g_random() % (high - low)) << 7) | mantissa;
}

bool same(uint32_t a, uint32_t b) {
  const bool both = std::isnan(float_of(a)) && std::isnan(float_of(b));
  return a == b || both;
}

void check_products() {
  long zeros = 0;
  long subnormal_inputs = 0;
  for (int round = 0; round < 60; ++round) {
    Tile left;
    Tile right;
    Tile sum;
    const auto fill = [&](Tile& t) {
      for (auto& row : t.words) {
        for (uint32_t& word : row) {
          // Two neighbouring kinds in a tile, so that sums are neither one term nor all lost.
          const auto draw = [&] {
            return any_value(std::min(4, round % 5 + static_cast<int>(g_random() % 2)));
          };
          word = draw() | static_cast<uint32_t>(draw()) << 16;
          if ((word & 0x7f80) == 0 && (word & 0x7f) != 0) ++subnormal_inputs;
        }
      }
    };
    fill(left);
    fill(right);
    for (auto& row : sum.words) {
      for (uint32_t& word : row) {
        word = static_cast<uint32_t>(any_value(round % 3)) << 16 | (g_random() & 0xffff);
      }
    }
    if (round % 7 == 6) left.words[3][4] = 0x7f80;  // an infinity
    Tile model = sum;
    model_tdpbf16ps(model, left, right);
    Tile emulated = sum;
    amx_emulated::multiply_once(emulated, left, right);
    Tile real = sum;
    amx::multiply_once(real, left, right);
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        const uint32_t expected = model.words[m][n];
        ACCELRT_CHECK(same(emulated.words[m][n], expected), "round ", round, " at ", m, ", ", n,
                      ": emulated ", float_of(emulated.words[m][n]), ", model ",
                      float_of(expected));
        ACCELRT_CHECK(same(real.words[m][n], expected), "round ", round, " at ", m, ", ", n,
                      ": instruction ", float_of(real.words[m][n]), ", model ", float_of(expected));
        ACCELRT_CHECK(std::fpclassify(float_of(expected)) != FP_SUBNORMAL, "a subnormal result");
        zeros += (expected & 0x7fffffffu) == 0;
      }
    }
  }
  ACCELRT_CHECK(zeros > 0 && subnormal_inputs > 0, "no underflow was tried");
  ACCELRT_CHECK(released(), "the tiles are not released");
}

void check_conv2d() {
  struct Case {
    int64_t images, channels, height, width, out_channels, kernel, stride, padding;
    bool channels_last;
  };
  const Case cases[] = {
      {1, 1, 1, 1, 1, 1, 1, 0, false},   {2, 3, 5, 7, 4, 3, 1, 1, false},
      {1, 33, 4, 16, 40, 3, 1, 1, true}, {5, 16, 3, 8, 33, 3, 1, 1, false},
      {3, 40, 7, 9, 17, 3, 2, 1, true},  {1, 400, 3, 6, 32, 1, 1, 0, false},
  };
  for (const Case& c : cases) {
    const int64_t weight_row = c.channels * c.kernel * c.kernel;
    // Of exact size: the sanitizer notices what is read beside them.
    const Values x = random_values(c.images * c.height * c.width * c.channels);
    const Values weight = random_values(c.out_channels * weight_row, 0.1f);
    const Values bias = random_values(c.out_channels);
    Conv2dParams p;
    p.x = x.data();
    p.weight = weight.data();
    p.bias = bias.data();
    p.images = c.images;
    p.height = c.height;
    p.width = c.width;
    p.channels = c.channels;
    p.out_height = (c.height + 2 * c.padding - c.kernel) / c.stride + 1;
    p.out_width = (c.width + 2 * c.padding - c.kernel) / c.stride + 1;
    p.out_channels = c.out_channels;
    p.kernel_height = p.kernel_width = c.kernel;
    p.stride_height = p.stride_width = c.stride;
    p.padding_top = p.padding_left = c.padding;
    p.weight_channels_last = c.channels_last;
    p.dtype = DType::kBFloat16;
    p.x_stride[2] = c.channels;
    p.x_stride[1] = c.width * c.channels;
    p.x_stride[0] = c.height * p.x_stride[1];
    p.out_stride[2] = c.out_channels;
    p.out_stride[1] = p.out_width * c.out_channels;
    p.out_stride[0] = p.out_height * p.out_stride[1];
    const Values before = random_values(c.images * p.out_stride[0]);
    const auto run = [&](void (*form)(const Conv2dParams&)) {
      Values out = before;
      p.out = out.data();
      form(p);
      return out;
    };
    ACCELRT_CHECK(run(amx::conv2d_cpu) == run(amx_emulated::conv2d_cpu), "conv2d of ", c.channels,
                  " channels differs");
    ACCELRT_CHECK(released(), "conv2d does not release the tiles");
  }
}

using Linear = void (*)(const LinearParams&);

void check_linear() {
  struct Case {
    int64_t rows, columns, depth, gap;  // gap: elements between the rows
    LinearEpilogue epilogue;
  };
  const Case cases[] = {
      {1, 1, 1, 0, LinearEpilogue::kNone},        {7, 19, 111, 1, LinearEpilogue::kGELU},
      {32, 32, 64, 0, LinearEpilogue::kGELUTanh}, {48, 70, 32, 3, LinearEpilogue::kGatedResidual},
      {49, 33, 800, 0, LinearEpilogue::kNone},    {17, 24, 90, 0, LinearEpilogue::kGEGLU},
      {720, 5, 3, 0, LinearEpilogue::kNone},      {3, 4, 0, 0, LinearEpilogue::kNone},
  };
  for (const Case& c : cases) {
    const int64_t weight_rows = is_geglu(c.epilogue) ? 2 * c.columns : c.columns;
    const int64_t stride = c.depth + c.gap;
    // Of exact size: the sanitizer notices what is read beside them.
    const Values x = random_values(c.rows * stride - c.gap);
    const Values weight = random_values(weight_rows * stride - c.gap, 0.1f);
    const Values bias = random_values(weight_rows);
    const Values gate = random_values(c.columns);
    const Values before = random_values(c.rows * c.columns);
    LinearParams p;
    p.x = x.data();
    p.weight = weight.data();
    p.bias = bias.data();
    p.x_stride = p.weight_stride = stride;
    p.out_stride = p.columns = c.columns;
    p.rows = c.rows;
    p.depth = c.depth;
    p.epilogue = c.epilogue;
    if (c.epilogue == LinearEpilogue::kGatedResidual) p.gate = gate.data();
    p.rows_per_sample = c.rows;
    p.dtype = DType::kBFloat16;
    const auto run = [&](Linear form) {
      Values out = before;
      p.out = out.data();
      form(p);
      return out;
    };
    ACCELRT_CHECK(run(amx::linear_cpu) == run(amx_emulated::linear_cpu), "linear [", c.rows, ", ",
                  c.columns, ", ", c.depth, "] differs");
    ACCELRT_CHECK(released(), "linear does not release the tiles");
  }
}

void check_attention() {
  struct Case {
    int64_t queries, keys;
    int dim;
    bool biased;
  };
  const Case cases[] = {
      {1, 1, 8, false},
      {33, 64, 40, false},
      {50, 300, 72, true},
      {16, 70, 256, false},
  };
  for (const Case& c : cases) {
    const int64_t heads = 2;
    const int64_t row = heads * c.dim;
    const Values q = random_values(c.queries * row, 2.f);
    const Values k = random_values(c.keys * row);
    const Values v = random_values(c.keys * row);
    const Values bias = random_values(c.queries * c.keys);
    AttentionParams p;
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    p.q_stride = p.k_stride = p.v_stride = p.out_stride = {0, row, c.dim};
    if (c.biased) {
      p.bias = bias.data();
      p.bias_stride = {0, c.keys, 0};
    }
    p.batch = 1;
    p.heads = heads;
    p.queries = c.queries;
    p.keys = c.keys;
    p.head_dim = c.dim;
    p.scale = 1 / std::sqrt(static_cast<double>(c.dim));
    p.dtype = DType::kBFloat16;
    const auto run = [&](void (*form)(const AttentionParams&)) {
      Values out(static_cast<size_t>(c.queries * row));
      p.out = out.data();
      form(p);
      return out;
    };
    ACCELRT_CHECK(run(amx::attention_cpu) == run(amx_emulated::attention_cpu), "attention [",
                  c.queries, ", ", c.keys, ", ", c.dim, "] differs");
    ACCELRT_CHECK(released(), "attention does not release the tiles");
  }
}

void check(const std::string& what) {
  if (what == "product") return check_products();
  if (what == "linear") return check_linear();
  if (what == "conv2d") return check_conv2d();
  if (what == "attention") return check_attention();
  ACCELRT_CHECK(false, "'", what, "' is none of product, linear, conv2d, attention");
}

}  // namespace
}  // namespace accelrt::tiles

int main(int argc, char** argv) {
  using namespace accelrt;
  const bool native = best_isa() == Isa::kAMX;
  if (!native) tiles::install_trap();
  set_num_threads(2);
  try {
    tiles::check(argc == 2 ? argv[1] : "");
    ACCELRT_CHECK(native || tiles::trapped() > 0, "no tile instruction was met");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  if (native) {
    std::puts("executed");
  } else {
    std::printf("trapped %ld\n", tiles::trapped());
  }
  return 0;
}
