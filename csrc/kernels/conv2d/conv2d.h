// out = convolution of channels-last images with a weight, plus bias. CPU only.
//
// x: [N, H, W, C], out: [N, H', W', O], the strides of channels one, the others free.
// weight: [O, C, kh, kw], contiguous, or with its channels last; bias: [O].
// Output row y reads the rows y * stride - padding + [0, kh) of x, columns likewise; what lies
// outside the image is zero, and out says how far the padding goes at the far ends.
// out overlaps no input. Sums are in float32 and rounded once, after the bias.
// Memory beside, per thread: a tile of x with its halo, in float32 or, for products of pairs, as it
// is, kConv2dTileBytes at most (unless that of a single output pixel is larger), and below 640 KiB
// whatever the weight: a panel of it, the sums that wait between panels, some pixels past the
// tile. With tile registers, for bfloat16: copies of a tile, twice kConv2dTileBytes at most, below
// 512 KiB of sums, and packed weights, kConv2dPackBytes at most (unless a panel of 32 output
// channels is larger), which the threads share.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

constexpr int64_t kConv2dTileBytes = int64_t{3} << 20;
constexpr int64_t kConv2dPackBytes = int64_t{16} << 20;

struct Conv2dParams {
  const void* x = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;  // null: zeros
  void* out = nullptr;
  int64_t x_stride[3] = {};  // of images, rows, columns
  int64_t out_stride[3] = {};
  int64_t images = 0;
  int64_t height = 0, width = 0, channels = 0;
  int64_t out_height = 0, out_width = 0, out_channels = 0;
  int64_t kernel_height = 1, kernel_width = 1;
  int64_t stride_height = 1, stride_width = 1;
  int64_t padding_top = 0, padding_left = 0;
  bool weight_channels_last = false;
  DType dtype = DType::kFloat32;
};

struct Conv2dGeometry {
  int64_t stride_height = 1, stride_width = 1;
  int64_t padding_height = 0, padding_width = 0;  // on both sides
};

// Throws unless the tensors are as above.
Conv2dParams conv2d_params(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                           const Conv2dGeometry& geometry, const TensorView& out);

void conv2d(const TensorView& x, const TensorView& weight, const OptionalView& bias,
            const Conv2dGeometry& geometry, const TensorView& out);

ACCELRT_DECLARE_CPU(conv2d_cpu, Conv2dParams)
ACCELRT_DECLARE_CPU_BF16(conv2d_cpu, Conv2dParams)
ACCELRT_DECLARE_CPU_TILES(conv2d_cpu, Conv2dParams)

}  // namespace accelrt
