// All factors fold into y = (x - centre) * gain + offset per (image, channel), computed once
// per thread and image; then one streaming pass. The centre is subtracted rather than folded
// into the offset: centre * gain would cancel where |mean| is much larger than the deviation.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "accelrt/aligned.h"
#include "accelrt/coarse.h"
#include "accelrt/dispatch.h"
#include "accelrt/parallel.h"
#include "accelrt/streaming.h"
#include "accelrt/vec.h"
#include "kernels/group_norm_apply/group_norm_apply.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

constexpr int64_t kItem = 32768;   // elements
constexpr int64_t kGrain = 16384;  // below it a second thread costs more than it saves

// Where the coefficients of a channel and of those after it are.
struct Table {
  const float* centre;
  const float* gain;
  const float* offset;

  Table from(int64_t channel) const { return {centre + channel, gain + channel, offset + channel}; }
};

// Of one image.
class Coefficients {
 public:
  explicit Coefficients(int64_t channels)
      : channels_(channels),
        stride_(whole_lines(channels + kLanes)),
        floats_(make_aligned(7 * stride_)) {}

  // From `channel` on, in their order.
  Table natural(int64_t channel) const { return table(0).from(channel); }
  // In the order of load_pair<T>: every 2 kLanes channels from the first of a part.
  template <typename T>
  Table paired(int64_t channel) const {
    return table(std::is_same_v<T, bfloat16> ? 4 : 0).from(channel);
  }

  template <typename T>
  void update(const GroupNormApplyParams& p, int64_t image) {
    if (image == image_) return;
    image_ = image;
    const GroupNormSource& s = p.source;
    float* const centre = floats_.get();
    float* const gain = centre + stride_;
    float* const offset = gain + stride_;
    float* const row = offset + stride_;
    const float* stats = p.stats + image / s.frames * s.groups * 3;
    for (int64_t g = 0; g < s.groups; ++g) {
      const float rstd = 1.f / std::sqrt(stats[3 * g + 2] / stats[3 * g] + p.eps);
      const int64_t first = g * s.group_channels;
      std::fill_n(centre + first, s.group_channels, stats[3 * g + 1]);
      std::fill_n(gain + first, s.group_channels, rstd);
    }
    const ChannelTable add{s.add, s.add_stride_n, s.add_stride_c};
    if (read<T>(add, image, row)) each([&](int64_t c) { centre[c] -= row[c]; });
    if (read<T>(p.weight, image, row)) each([&](int64_t c) { gain[c] *= row[c]; });
    if (!read<T>(p.bias, image, offset)) std::fill_n(offset, channels_, 0.f);
    if (read<T>(p.scale, image, row)) {
      each([&](int64_t c) {
        gain[c] *= 1.f + row[c];
        offset[c] *= 1.f + row[c];
      });
    }
    if (read<T>(p.shift, image, row)) each([&](int64_t c) { offset[c] += row[c]; });
    if constexpr (std::is_same_v<T, bfloat16>) {
      for (int i = 0; i < s.parts; ++i) pair_up(s.part[i].first, s.part[i].channels);
    }
  }

 private:
  template <typename T>
  bool read(const ChannelTable& table, int64_t image, float* row) const {
    if (table.data == nullptr) return false;
    const T* from = static_cast<const T*>(table.data) + image * table.n;
    if (table.c == 1) {
      for_lanes(channels_, [&](int64_t c, int n) { store_any(row + c, n, load_any(from + c, n)); });
    } else {
      for (int64_t c = 0; c < channels_; ++c) row[c] = to_float(from[c * table.c]);
    }
    return true;
  }

  template <typename Fn>
  void each(const Fn& fn) const {
    for (int64_t c = 0; c < channels_; ++c) fn(c);
  }

  Table table(int64_t row) const {
    const float* first = floats_.get() + row * stride_;
    return {first, first + stride_, first + 2 * stride_};
  }

  // Even and odd channels apart, as load_pair has them.
  void pair_up(int64_t first, int64_t channels) {
    for (int row = 0; row < 3; ++row) {
      const float* from = floats_.get() + row * stride_ + first;
      float* to = floats_.get() + (row + 4) * stride_ + first;
      for (int64_t c = 0; c + 2 * kLanes <= channels; c += 2 * kLanes) {
        for (int i = 0; i < kLanes; ++i) {
          to[c + i] = from[c + 2 * i];
          to[c + kLanes + i] = from[c + 2 * i + 1];
        }
      }
    }
  }

  int64_t channels_;
  int64_t stride_;
  AlignedFloats floats_;  // centre, gain, offset; a row of scratch; the same three, paired
  int64_t image_ = -1;
};

template <bool kSiLU, typename T>
inline Vec normalise(Vec x, Vec centre, Vec gain, Vec offset) {
  const Vec y = fma(x - centre, gain, offset);
  if constexpr (kSiLU) return silu_to<T>(y);
  return y;
}

// Channels [c, c + lanes) of a pixel.
template <bool kSiLU, typename T>
inline Vec normalise_at(const T* x, int64_t c, int lanes, const Table& table) {
  return normalise<kSiLU, T>(load_any(x + c, lanes), load(table.centre + c), load(table.gain + c),
                             load(table.offset + c));
}

// One pixel of one part; channels are contiguous. The last vector overlaps its neighbour instead
// of being partial, and is read before anything is written: out may be x.
template <bool kSiLU, typename T>
inline void pixel_of(const T* x, T* out, int64_t channels, const Table& natural,
                     const Table& paired, bool past) {
  if (channels < kLanes) {
    const int lanes = static_cast<int>(channels);
    store_any(out, lanes, normalise_at<kSiLU>(x, 0, lanes, natural));
    return;
  }
  const int64_t end = channels - kLanes;
  const bool partial = channels % kLanes != 0;
  Vec last;
  if (partial) last = normalise_at<kSiLU>(x, end, kLanes, natural);
  int64_t c = 0;
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
    Vec a, b, m0, m1, g0, g1, o0, o1;
    load_pair(x + c, a, b);
    load_pair(paired.centre + c, m0, m1);
    load_pair(paired.gain + c, g0, g1);
    load_pair(paired.offset + c, o0, o1);
    store_pair(out + c, normalise<kSiLU, T>(a, m0, g0, o0), normalise<kSiLU, T>(b, m1, g1, o1),
               past);
  }
  if (c <= end) store(out + c, normalise_at<kSiLU>(x, c, kLanes, natural));
  if (partial) store(out + end, last);
}

// n pixels of one channel.
template <bool kSiLU, typename T>
inline void channel_run(const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t n,
                        float centre, float gain, float offset) {
  const Vec m(centre);
  const Vec a(gain);
  const Vec b(offset);
  if (x_stride == 1 && out_stride == 1) {
    const bool overlap = n % kLanes != 0 && n > kLanes;
    Vec last;
    if (overlap) last = normalise<kSiLU, T>(load(x + n - kLanes), m, a, b);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, normalise<kSiLU, T>(load(x + i), m, a, b));
    if (overlap) {
      store(out + n - kLanes, last);
    } else if (i < n) {
      const int lanes = static_cast<int>(n - i);
      store_n(out + i, lanes, normalise<kSiLU, T>(load_n(x + i, lanes), m, a, b));
    }
    return;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, n - i));
    Vec v(0.f);
    for (int k = 0; k < lanes; ++k) v.v[k] = to_float(x[(i + k) * x_stride]);
    v = normalise<kSiLU, T>(v, m, a, b);
    for (int k = 0; k < lanes; ++k) out[(i + k) * out_stride] = from_float<T>(v.v[k]);
  }
}

// Channels [c0, c1) of the pixels [begin, end) of an image.
struct Tile {
  int64_t image;
  int64_t c0;
  int64_t c1;
  int64_t begin;
  int64_t end;
};

template <bool kSiLU, typename T>
void channels_last_tile(const GroupNormSource& s, const GroupNormPart& part, const Tile& tile,
                        const T* x, T* out, const ImageStrides& to, const Table& natural,
                        const Table& paired, bool streams) {
  const ImageStrides& from = part.stride;
  s.for_segments(tile.begin, tile.end, [&](int64_t row, int64_t at, int64_t n) {
    const T* source = x + row * from.h + at * from.w;
    T* target = out + row * to.h + at * to.w;
    for (int64_t i = 0; i < n; ++i) {
      pixel_of<kSiLU>(source, target, part.channels, natural, paired,
                      streams && starts_line(target));
      source += from.w;
      target += to.w;
    }
  });
}

template <bool kSiLU, typename T>
void channel_tile(const GroupNormSource& s, const GroupNormPart& part, const Tile& tile, const T* x,
                  T* out, const ImageStrides& to, const Table& table) {
  const ImageStrides& from = part.stride;
  const int64_t from_w = s.width == 1 ? 1 : from.w;
  const int64_t to_w = s.width == 1 ? 1 : to.w;
  for (int64_t c = tile.c0; c < tile.c1; ++c) {
    s.for_segments(tile.begin, tile.end, [&](int64_t row, int64_t at, int64_t n) {
      channel_run<kSiLU>(x + c * from.c + row * from.h + at * from.w, from_w,
                         out + c * to.c + row * to.h + at * to.w, to_w, n, table.centre[c],
                         table.gain[c], table.offset[c]);
    });
  }
}

template <typename T, bool kSiLU>
void run_part(const GroupNormApplyParams& p, const GroupNormPart& part) {
  const GroupNormSource& s = p.source;
  const ImageStrides& from = part.stride;
  const ImageStrides& to = p.out_stride;
  const int64_t pixels = s.pixels();
  const bool channels_last = from.c == 1 && to.c == 1 && part.channels > 1;
  const bool planar = s.width == 1 || (from.w == 1 && to.w == 1);
  int64_t pixel_chunk;
  int64_t channel_chunk = part.channels;
  if (channels_last) {
    pixel_chunk = std::clamp<int64_t>(kItem / part.channels, 1, pixels);
  } else if (planar) {
    pixel_chunk = std::min(pixels, kItem);
    channel_chunk = std::clamp<int64_t>(kItem / pixel_chunk, 1, part.channels);
  } else {
    // Mixed layouts: few pixels at a time, so that the lines of the strided side stay cached.
    pixel_chunk = std::min<int64_t>(pixels, 64);
  }
  const int64_t pixel_chunks = (pixels + pixel_chunk - 1) / pixel_chunk;
  const int64_t channel_chunks = (part.channels + channel_chunk - 1) / channel_chunk;
  const int64_t per_image = pixel_chunks * channel_chunks;
  const int64_t grain = std::max<int64_t>(1, kGrain / (pixel_chunk * channel_chunk));
  const bool streams = p.out != s.part[0].data && p.out != s.part[s.parts - 1].data &&
                       worth_streaming(s.images * pixels * s.channels * size_of(s.dtype));
  parallel_for(0, s.images * per_image, grain, [&](int64_t first, int64_t last) {
    Coefficients coefficients(s.channels);
    for (int64_t i = first; i < last; ++i) {
      Tile tile;
      tile.image = i / per_image;
      tile.c0 = i % per_image / pixel_chunks * channel_chunk;
      tile.c1 = std::min(tile.c0 + channel_chunk, part.channels);
      tile.begin = i % pixel_chunks * pixel_chunk;
      tile.end = std::min(tile.begin + pixel_chunk, pixels);
      coefficients.update<T>(p, tile.image);
      const Table natural = coefficients.natural(part.first);
      // No __restrict__: out may be x.
      const T* x = static_cast<const T*>(part.data) + tile.image * from.n;
      T* out = static_cast<T*>(p.out) + tile.image * to.n + part.first * to.c;
      if (channels_last) {
        channels_last_tile<kSiLU>(s, part, tile, x, out, to, natural,
                                  coefficients.paired<T>(part.first), streams);
      } else {
        channel_tile<kSiLU>(s, part, tile, x, out, to, natural);
      }
    }
    end_streaming(streams);
  });
}

}  // namespace

void group_norm_apply_cpu(const GroupNormApplyParams& p) {
  dispatch_dtype("group_norm_apply", p.source.dtype, [&](auto tag) {
    dispatch_bool(p.silu, [&](auto silu) {
      for (int i = 0; i < p.source.parts; ++i) {
        run_part<typename decltype(tag)::type, silu.value>(p, p.source.part[i]);
      }
    });
  });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
