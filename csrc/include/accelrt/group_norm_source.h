// The logical input of the two passes of GroupNorm: one or two tensors that are read as if
// concatenated along the channels, [N, C1 + C2, H, W], with free strides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "accelrt/tensor_view.h"

namespace accelrt {

// [N, C, H, W]; `w` is the stride between pixels where height is 1.
struct ImageStrides {
  int64_t n = 0;
  int64_t c = 0;
  int64_t h = 0;
  int64_t w = 0;
};

struct GroupNormPart {
  const void* data = nullptr;
  int64_t first = 0;  // the first of its channels in the concatenation
  int64_t channels = 0;
  ImageStrides stride;
};

struct GroupNormSource {
  GroupNormPart part[2];
  int parts = 1;
  int64_t images = 0;
  int64_t channels = 0;  // of all parts
  // The pixels; height is 1 if height and width collapse into one axis in all tensors.
  int64_t height = 1;
  int64_t width = 1;
  int64_t groups = 1;
  int64_t group_channels = 1;  // of one group; a group may straddle the two parts
  int64_t frames = 1;          // consecutive images that share statistics
  const void* add = nullptr;   // [N, C]
  int64_t add_stride_n = 0;
  int64_t add_stride_c = 0;
  DType dtype = DType::kFloat32;

  ACCELRT_HOST_DEVICE int64_t pixels() const { return height * width; }

  // Of a pixel, from the first one of its image and channel.
  ACCELRT_HOST_DEVICE int64_t offset(const ImageStrides& stride, int pixel) const {
    if (height == 1) return pixel * stride.w;
    const int row = pixel / static_cast<int>(width);
    return row * stride.h + (pixel - row * static_cast<int>(width)) * stride.w;
  }

  // Calls fn(row of the image, first pixel in it, pixels) for the pixels [begin, end).
  template <typename Fn>
  void for_segments(int64_t begin, int64_t end, const Fn& fn) const {
    while (begin < end) {
      const int64_t at = begin % width;
      const int64_t n = std::min(width - at, end - begin);
      fn(begin / width, at, n);
      begin += n;
    }
  }

  // Every part has stride 1 between channels.
  bool channels_last() const {
    return part[0].stride.c == 1 && (parts == 1 || part[1].stride.c == 1);
  }
};

namespace detail {

inline ImageStrides image_strides(const TensorView& t) {
  // A stride along a dimension of size one is never used; 0 makes it compatible with all.
  ImageStrides s{t.stride[0], t.stride[1], t.stride[2], t.stride[3]};
  if (t.size[0] == 1) s.n = 0;
  // One pixel, or one channel: either layout; what follows prefers channels-last for one pixel
  // and the planar form for one channel.
  if (t.size[2] == 1) s.h = 0;
  if (t.size[3] == 1) s.w = 0;
  if (t.size[1] == 1) s.c = t.size[2] * t.size[3] == 1 ? 1 : 0;
  return s;
}

}  // namespace detail

// Checks the inputs that both passes have, and brings them to the fewest axes. `out` (may be
// null) takes part in the choice of the pixel axes; its strides are returned.
inline GroupNormSource make_group_norm_source(const char* op, const TensorView& x,
                                              const OptionalView& x2, const OptionalView& add,
                                              int64_t groups, int64_t frames,
                                              const TensorView* out = nullptr,
                                              ImageStrides* out_strides = nullptr) {
  ACCELRT_CHECK(x.ndim == 4, op, ": x has ", x.ndim, " dimensions, expected [N, C, H, W]");
  GroupNormSource s;
  s.images = x.size[0];
  s.channels = x.size[1];
  s.dtype = x.dtype;
  s.frames = frames;
  ACCELRT_CHECK(frames >= 1 && x.size[0] % frames == 0, op, ": frames ", frames,
                " does not divide the ", x.size[0], " images");
  if (x2) {
    check_same_type(op, "x2", *x2, x);
    ACCELRT_CHECK(x2->ndim == 4 && x2->size[0] == x.size[0] && x2->size[2] == x.size[2] &&
                      x2->size[3] == x.size[3],
                  op, ": x2 does not match x");
    s.channels += x2->size[1];
  }
  ACCELRT_CHECK(groups >= 1 && s.channels % groups == 0, op, ": num_groups ", groups,
                " does not divide the ", s.channels, " channels");
  s.groups = groups;
  s.group_channels = s.channels / groups;
  if (add) {
    check_same_type(op, "add", *add, x);
    ACCELRT_CHECK(add->ndim == 2 && add->size[0] == s.images && add->size[1] == s.channels, op,
                  ": add is not [N, C]");
    s.add = add->data;
    s.add_stride_n = add->stride[0];
    s.add_stride_c = add->stride[1];
  }
  if (out != nullptr) {
    check_same_type(op, "out", *out, x);
    ACCELRT_CHECK(out->ndim == 4 && out->size[0] == s.images && out->size[1] == s.channels &&
                      out->size[2] == x.size[2] && out->size[3] == x.size[3],
                  op, ": out is not [N, C, H, W]");
  }

  s.parts = 0;
  int64_t first = 0;
  for (const TensorView* t : {&x, x2 ? &*x2 : nullptr}) {
    if (t == nullptr || t->size[1] == 0) continue;
    s.part[s.parts++] = {t->data, first, t->size[1], detail::image_strides(*t)};
    first += t->size[1];
  }
  s.height = x.size[2];
  s.width = x.size[3];
  ImageStrides* all[3] = {};
  int count = 0;
  for (int i = 0; i < s.parts; ++i) all[count++] = &s.part[i].stride;
  ImageStrides target;
  if (out != nullptr) {
    target = detail::image_strides(*out);
    all[count++] = &target;
  }
  // The order of the pixels is free as long as all tensors agree: the faster axis last.
  if (s.parts > 0 && s.height > 1 && (s.width == 1 || all[0]->h < all[0]->w)) {
    std::swap(s.height, s.width);
    for (int i = 0; i < count; ++i) std::swap(all[i]->h, all[i]->w);
  }
  bool collapse = true;
  for (int i = 0; i < count; ++i) collapse &= s.height == 1 || all[i]->h == all[i]->w * s.width;
  if (collapse) {
    s.width *= s.height;
    s.height = 1;
    for (int i = 0; i < count; ++i) all[i]->h = 0;
  }
  ACCELRT_CHECK(s.pixels() <= (1 << 30), op, ": ", s.pixels(), " pixels in an image");
  if (out_strides != nullptr) *out_strides = target;
  return s;
}

}  // namespace accelrt
