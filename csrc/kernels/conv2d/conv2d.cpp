#include "kernels/conv2d/conv2d.h"

#include "accelrt/backend.h"

namespace accelrt {
namespace {

constexpr const char* kOp = "conv2d";

void check_images(const char* name, const TensorView& t, const TensorView& like) {
  check_same_type(kOp, name, t, like);
  ACCELRT_CHECK(t.ndim == 4, kOp, ": ", name, " has ", t.ndim, " dimensions, expected 4");
  check_unit_stride(kOp, name, t);
}

// Whether [O, C, kh, kw] lies densely in the order of `order`; strides of sizes of one are free.
bool lies_in_order(const TensorView& t, const int (&order)[3]) {
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  for (const int d : order) {
    if (t.size[d] > 1 && t.stride[d] != expected) return false;
    expected *= t.size[d];
  }
  return t.size[0] <= 1 || t.stride[0] == expected;
}

void check_extent(const char* what, int64_t out, int64_t in, int64_t kernel, int64_t stride,
                  int64_t padding) {
  ACCELRT_CHECK(stride >= 1 && padding >= 0, kOp, ": stride ", stride, " and padding ", padding,
                " of the ", what, "; expected at least 1 and 0");
  const int64_t left = in + 2 * padding - kernel;
  const int64_t expected = left < 0 ? 0 : left / stride + 1;
  ACCELRT_CHECK(out == expected && expected > 0, kOp, ": the ", what, " of out is ", out,
                "; that of the convolution is ", expected);
}

}  // namespace

Conv2dParams conv2d_params(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                           const Conv2dGeometry& geometry, const TensorView& out) {
  ACCELRT_CHECK(x.device == Device::kCPU, kOp,
                ": x is on another device than the CPU; there the library's convolution serves");
  check_images("x", x, x);
  check_images("out", out, x);
  check_same_type(kOp, "weight", weight, x);
  ACCELRT_CHECK(weight.ndim == 4 && weight.size[1] == x.size[3], kOp,
                ": weight is not of shape [O, ", x.size[3], ", kh, kw]");
  ACCELRT_CHECK(weight.size[2] >= 1 && weight.size[3] >= 1, kOp, ": the kernel is empty");
  const bool planar = lies_in_order(weight, {3, 2, 1});
  ACCELRT_CHECK(planar || lies_in_order(weight, {1, 3, 2}), kOp,
                ": weight is neither contiguous nor channels-last");
  if (bias) {
    check_same_type(kOp, "bias", *bias, x);
    ACCELRT_CHECK(bias->ndim == 1 && bias->size[0] == weight.size[0], kOp,
                  ": bias is not of shape [", weight.size[0], "]");
    check_unit_stride(kOp, "bias", *bias);
  }
  ACCELRT_CHECK(out.size[0] == x.size[0] && out.size[3] == weight.size[0], kOp, ": out has ",
                out.size[0], " images of ", out.size[3], " channels, expected ", x.size[0], " of ",
                weight.size[0]);
  check_extent("height", out.size[1], x.size[1], weight.size[2], geometry.stride_height,
               geometry.padding_height);
  check_extent("width", out.size[2], x.size[2], weight.size[3], geometry.stride_width,
               geometry.padding_width);

  Conv2dParams p;
  p.x = x.data;
  p.weight = weight.data;
  p.bias = data_or_null(bias);
  p.out = out.data;
  for (int i = 0; i < 3; ++i) {
    p.x_stride[i] = x.stride[i];
    p.out_stride[i] = out.stride[i];
  }
  p.images = x.size[0];
  p.height = x.size[1];
  p.width = x.size[2];
  p.channels = x.size[3];
  p.out_height = out.size[1];
  p.out_width = out.size[2];
  p.out_channels = out.size[3];
  p.kernel_height = weight.size[2];
  p.kernel_width = weight.size[3];
  p.stride_height = geometry.stride_height;
  p.stride_width = geometry.stride_width;
  p.padding_top = geometry.padding_height;
  p.padding_left = geometry.padding_width;
  p.weight_channels_last = !planar;
  p.dtype = x.dtype;
  return p;
}

void conv2d(const TensorView& x, const TensorView& weight, const OptionalView& bias,
            const Conv2dGeometry& geometry, const TensorView& out) {
  const Conv2dParams p = conv2d_params(x, weight, bias, geometry, out);
  if (p.images == 0 || p.out_channels == 0) return;
  ACCELRT_CALL_CPU_TILES(conv2d_cpu, p);
}

}  // namespace accelrt
