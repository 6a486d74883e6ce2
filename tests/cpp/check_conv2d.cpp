#include "cpu_check.h"
#include "kernels/conv2d/conv2d.h"

namespace accelrt::guarded {
namespace {

struct Case {
  int64_t images, channels, height, width, out_channels;
  int64_t kernel_height, kernel_width;
  int64_t stride_height = 1, stride_width = 1;
  int64_t padding_height = 0, padding_width = 0;
  // Elements after each image, row and pixel.
  int64_t x_gap[3] = {};
  int64_t out_gap[3] = {};
  bool bias = true;
  bool large = false;  // for bfloat16 and one order of the weights alone
  bool tiles = false;  // large, and for the tile registers alone
};

const Case kCases[] = {
    // One pixel, one row, one column.
    {1, 1, 1, 1, 1, 1, 1},
    {1, 3, 1, 1, 5, 3, 3, 1, 1, 1, 1},
    {1, 33, 1, 1, 17, 1, 1},
    {2, 5, 1, 9, 3, 3, 3, 1, 1, 1, 1},
    {2, 6, 9, 1, 33, 3, 3, 1, 1, 1, 1},
    // Channels beside the vectors and the pairs, output channels beside the panels.
    {1, 1, 4, 5, 15, 3, 3, 1, 1, 1, 1},
    {2, 2, 5, 7, 16, 3, 3, 1, 1, 1, 1},
    {1, 7, 4, 4, 31, 3, 3, 1, 1, 1, 1},
    {1, 15, 3, 6, 32, 3, 3, 1, 1, 1, 1, {}, {}, false},
    {1, 16, 6, 3, 33, 3, 3, 1, 1, 1, 1},
    {1, 17, 3, 13, 47, 3, 3, 1, 1, 1, 1},
    {2, 31, 5, 5, 64, 3, 3, 1, 1, 1, 1},
    {1, 32, 2, 25, 65, 3, 3, 1, 1, 1, 1},
    {1, 33, 4, 16, 40, 3, 3, 1, 1, 1, 1},
    {1, 65, 3, 4, 2, 3, 3, 1, 1, 1, 1},
    {3, 63, 2, 3, 9, 1, 1, 1, 1, 0, 0, {}, {}, false},
    {1, 0, 3, 4, 5, 3, 3, 1, 1, 1, 1},
    // Output columns beside the blocks of pixels, and images that share a tile.
    {5, 4, 3, 8, 3, 3, 3, 1, 1, 1, 1},
    {7, 3, 2, 2, 4, 3, 3, 1, 1, 1, 1},
    {1, 4, 2, 11, 3, 1, 1},
    {1, 4, 2, 19, 3, 3, 3, 1, 1, 1, 1},
    {3, 4, 5, 24, 3, 3, 3, 1, 1, 1, 1},
    {1, 3, 2, 300, 5, 3, 3, 1, 1, 1, 1},  // columns in two tiles
    {1, 3, 31, 41, 5, 3, 3, 1, 1, 1, 1},  // rows in tiles
    {2, 4, 3, 4, 19, 3, 1, 1, 1, 1, 0},   // along frames
    {1, 3, 70, 23, 5, 3, 1, 1, 1, 1, 0},  // the same in tiles
    {2, 5, 4, 6, 7, 1, 3, 1, 1, 0, 1},
    // Other kernels, strides and paddings; some see nothing but padding.
    {2, 9, 8, 10, 6, 3, 3, 2, 2, 1, 1},
    {3, 40, 7, 9, 17, 3, 3, 2, 2, 1, 1},
    {1, 5, 33, 34, 6, 3, 3, 2, 2, 0, 0},
    {2, 6, 7, 5, 4, 1, 1, 2, 2},
    {1, 3, 9, 40, 5, 2, 4, 3, 2, 1, 2},
    {1, 2, 1, 1, 3, 5, 5, 1, 1, 2, 2},
    {1, 3, 2, 3, 4, 1, 1, 1, 1, 2, 3},
    {1, 4, 3, 2, 5, 3, 3, 2, 1, 4, 3},
    {1, 3, 6, 18, 5, 3, 3, 1, 3, 1, 1},
    // Bands: rows of a larger image in and out, with their halo.
    {1, 9, 6, 7, 5, 3, 3, 1, 1, 0, 1, {0, 0, 0}, {40, 0, 0}},
    {2, 10, 3, 16, 33, 3, 3, 1, 1, 0, 1, {77, 0, 0}, {99, 0, 0}},
    // Channels of a wider tensor, columns of a wider image.
    {2, 5, 4, 5, 6, 3, 3, 1, 1, 1, 1, {3, 2, 1}, {5, 4, 3}},
    {2, 32, 3, 5, 16, 1, 1, 1, 1, 0, 0, {0, 0, 7}, {0, 0, 1}},
    {2, 8, 3, 5, 16, 1, 1, 1, 1, 0, 0, {0, 9, 0}, {0, 0, 0}},
    {1, 8, 3, 5, 16, 1, 1, 1, 1, 0, 0, {0, 0, 0}, {0, 5, 0}},
    // More than a panel takes; pixels whose distance is a power of two; a tile cut by its size.
    {1, 300, 3, 4, 5, 3, 3, 1, 1, 1, 1},
    {1, 470, 2, 3, 3, 3, 3, 1, 1, 1, 1},
    {1, 400, 3, 6, 32, 1, 1},
    {1, 512, 2, 5, 3, 1, 1},
    {1, 1024, 2, 5, 3, 1, 1},
    {1, 2050, 1, 40, 2, 1, 1},
    {1, 96, 169, 249, 2, 1, 1, 8, 8, 0, 0, {}, {}, true, true},
    // More weights than are packed at a time.
    {1, 140000, 1, 2, 33, 1, 1, 1, 1, 0, 0, {}, {}, true, true, true},
};

std::string text_of(const Case& c, DType dtype, bool channels_last) {
  std::ostringstream text;
  text << "conv2d " << name_of(dtype) << " [" << c.images << ", " << c.height << ", " << c.width
       << ", " << c.channels << "] to " << c.out_channels << ", kernel " << c.kernel_height << " x "
       << c.kernel_width << ", stride " << c.stride_height << " x " << c.stride_width
       << ", padding " << c.padding_height << " x " << c.padding_width
       << (channels_last ? ", weights channels-last" : "");
  return text.str();
}

// [O, kh, kw, C] to [O, C, kh, kw].
Values planar(const Case& c, const Values& weight) {
  const int64_t taps = c.kernel_height * c.kernel_width;
  Values to(weight.size());
  for (int64_t o = 0; o < c.out_channels; ++o) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t i = 0; i < c.channels; ++i) {
        to[(o * c.channels + i) * taps + tap] = weight[(o * taps + tap) * c.channels + i];
      }
    }
  }
  return to;
}

// All channels-last; whole 64ths, hence exact.
Values convolved(const Case& c, int64_t out_height, int64_t out_width, const Values& x,
                 const Values& weight, const Values& bias) {
  Values out;
  for (int64_t n = 0; n < c.images; ++n) {
    for (int64_t row = 0; row < out_height; ++row) {
      for (int64_t column = 0; column < out_width; ++column) {
        for (int64_t o = 0; o < c.out_channels; ++o) {
          float sum = c.bias ? bias[o] : 0.f;
          for (int64_t dy = 0; dy < c.kernel_height; ++dy) {
            const int64_t y = row * c.stride_height - c.padding_height + dy;
            if (y < 0 || y >= c.height) continue;
            for (int64_t dx = 0; dx < c.kernel_width; ++dx) {
              const int64_t at = column * c.stride_width - c.padding_width + dx;
              if (at < 0 || at >= c.width) continue;
              const float* pixel = x.data() + ((n * c.height + y) * c.width + at) * c.channels;
              const float* tap =
                  weight.data() + ((o * c.kernel_height + dy) * c.kernel_width + dx) * c.channels;
              for (int64_t i = 0; i < c.channels; ++i) sum += pixel[i] * tap[i];
            }
          }
          out.push_back(sum);
        }
      }
    }
  }
  return out;
}

void check(const Case& c) {
  const int64_t taps = c.kernel_height * c.kernel_width;
  const int64_t out_height =
      (c.height + 2 * c.padding_height - c.kernel_height) / c.stride_height + 1;
  const int64_t out_width = (c.width + 2 * c.padding_width - c.kernel_width) / c.stride_width + 1;
  const Values x = eighths(c.images * c.height * c.width * c.channels);
  const Values weight = eighths(c.out_channels * taps * c.channels);
  const Values bias = eighths(c.out_channels);
  const Values truth = convolved(c, out_height, out_width, x, weight, bias);
  const Values planar_weight = planar(c, weight);
  for (const DType dtype : kDTypes) {
    for (const bool channels_last : {false, true}) {
      if (c.large && (dtype != DType::kBFloat16 || channels_last)) continue;
      set_case(text_of(c, dtype, channels_last));
      const auto run = [&](auto kernel, Side side) {
        const Input image(
            dtype, side,
            {{c.images, c.x_gap[0]}, {c.height, c.x_gap[1]}, {c.width, c.x_gap[2]}, {c.channels}},
            x);
        const Input weights(dtype, side, {{c.out_channels}, {taps * c.channels}},
                            channels_last ? weight : planar_weight);
        const Input biases(dtype, side, {{c.out_channels}}, bias);
        const Tensor out(dtype, side,
                         {{c.images, c.out_gap[0]},
                          {out_height, c.out_gap[1]},
                          {out_width, c.out_gap[2]},
                          {c.out_channels}});
        Conv2dParams p;
        // What has no elements may have no address.
        p.x = x.empty() ? nullptr : image.data();
        p.weight = x.empty() ? nullptr : weights.data();
        p.bias = c.bias ? biases.data() : nullptr;
        p.out = out.data();
        for (int d = 0; d < 3; ++d) {
          p.x_stride[d] = image.stride(d);
          p.out_stride[d] = out.stride(d);
        }
        p.images = c.images;
        p.height = c.height;
        p.width = c.width;
        p.channels = c.channels;
        p.out_height = out_height;
        p.out_width = out_width;
        p.out_channels = c.out_channels;
        p.kernel_height = c.kernel_height;
        p.kernel_width = c.kernel_width;
        p.stride_height = c.stride_height;
        p.stride_width = c.stride_width;
        p.padding_top = c.padding_height;
        p.padding_left = c.padding_width;
        p.weight_channels_last = channels_last;
        p.dtype = dtype;
        kernel(p);
        out.check(truth);
      };
      if (c.tiles) {
        for_forms<Conv2dParams>(ACCELRT_TILES_ALONE(conv2d_cpu), dtype, run);
      } else {
        for_forms<Conv2dParams>(ACCELRT_FORMS_WITH_TILES(conv2d_cpu), dtype, run);
      }
    }
  }
}

}  // namespace

void check_conv2d() {
  for (const Case& c : kCases) check(c);
}

}  // namespace accelrt::guarded
