// Work items are (image, chunk of pixels[, group]); each leaves the mean and M2 of its groups,
// and the items of a clip are merged at the end in a fixed order, so that the result does not
// depend on the number of threads.
//
// Inside an item the sums of (x - pivot) and (x - pivot)^2 are taken with the mean of the
// item's first elements as the pivot. However far the rest lies from it, the square of that
// distance is part of the item's M2 too, so that the cancellation of the shifted formula
// stays below (elements / elements of the pivot) * 2^-24 of the result.
#include <algorithm>
#include <vector>

#include "accelrt/aligned.h"
#include "accelrt/dispatch.h"
#include "accelrt/parallel.h"
#include "accelrt/vec.h"
#include "kernels/group_norm_stats/group_norm_stats.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

// Elements of an item: large enough to hide the merging, small enough to share out.
constexpr int64_t kItem = 131072;
// Pixels of a channels-last item: bounds the cancellation.
constexpr int64_t kMaxPixels = 4096;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;
};

// ---- Channels-last: a vector holds neighbouring channels ------------------------------------

// Calls fn(channel, slot, lanes) for vectors that cover [0, channels). The last one overlaps
// its neighbour instead of being partial (if there is a whole one): its slot is its own.
template <typename Fn>
inline void for_channel_vectors(int64_t channels, const Fn& fn) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) fn(c, c, kLanes);
  if (c == channels) return;
  if (channels >= kLanes) {
    fn(channels - kLanes, c, kLanes);
  } else {
    fn(0, 0, static_cast<int>(channels));
  }
}

// Adds kRows pixels of `lanes` channels to the sums around the pivots. The pixels are summed
// before they meet the long sums: fewer roundings at their size.
template <int kRows, typename T>
[[gnu::always_inline]] inline void add_vectors(const T* x, int64_t stride, int lanes,
                                               const float* pivot, float* s1, float* s2) {
  const Vec centre = load(pivot);
  Vec a(0.f);
  Vec b(0.f);
  for (int r = 0; r < kRows; ++r) {
    const Vec d = load_any(x + r * stride, lanes) - centre;
    a += d;
    b = fma(d, d, b);
  }
  store(s1, load(s1) + a);
  store(s2, load(s2) + b);
}

// How what comes later is brought closer, in the order of memory, since reading several rows in
// turn defeats the hardware's prefetching: loaded to the first-level cache, if it holds all of
// that, or asked for to the second-level one, which costs more.
enum class Ahead { kNothing, kLoad, kPrefetch };

// kRows pixels of all channels of one part, at least `channels` apart if there are several.
// `ahead` is kRows pixels that come later (or these).
template <int kRows, Ahead kAhead, typename T>
inline void add_pixels(const T* x, int64_t stride, int64_t channels, const float* pivot, float* s1,
                       float* s2, const T* ahead) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    for (int64_t i = 0; i < kRows * kLanes; i += 64 / sizeof(T)) {
      const T* const line = ahead + c * kRows + i;
      if (kAhead == Ahead::kLoad) static_cast<void>(*reinterpret_cast<const volatile char*>(line));
      if (kAhead == Ahead::kPrefetch) __builtin_prefetch(line, 0, 2);
    }
    add_vectors<kRows>(x + c, stride, kLanes, pivot + c, s1 + c, s2 + c);
  }
  if (c == channels) return;
  if (channels >= kLanes) {
    add_vectors<kRows>(x + channels - kLanes, stride, kLanes, pivot + c, s1 + c, s2 + c);
  } else {
    add_vectors<kRows>(x, stride, static_cast<int>(channels), pivot, s1, s2);
  }
}

// n pixels, kRows at a time.
template <int kRows, Ahead kAhead, typename T>
void add_run(const T* x, int64_t stride, int64_t n, int64_t channels, const float* pivot, float* s1,
             float* s2) {
  int64_t i = 0;
  for (; i + kRows <= n; i += kRows) {
    const int64_t next = i + 2 * kRows <= n ? i + kRows : i;
    add_pixels<kRows, kAhead>(x + i * stride, stride, channels, pivot, s1, s2, x + next * stride);
  }
  for (; i < n; ++i) {
    add_pixels<1, Ahead::kNothing>(x + i * stride, 0, channels, pivot, s1, s2, x + i * stride);
  }
}

constexpr int kRows = 8;
// Of kRows pixels, of which the first-level cache holds twice as many beside their sums.
constexpr int64_t kLoadBytes = 5120;
// Of the pixels taken at a time.
constexpr int64_t kPrefetchBytes = 20480;

// Of fn(0), ..., fn(n - 1), in independent chains.
template <typename Fn>
inline float sum_of(int64_t n, const Fn& fn) {
  float t[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) t[k] += fn(i + k);
  }
  for (int k = 0; i + k < n; ++k) t[k] += fn(i + k);
  return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}

class ChannelsLastItem {
 public:
  explicit ChannelsLastItem(const GroupNormSource& s)
      : slots_(whole_lines(s.part[0].channels) +
               (s.parts == 2 ? whole_lines(s.part[1].channels) : 0)),
        floats_(make_aligned(3 * slots_ + 2 * whole_lines(s.channels))) {}

  template <typename T>
  void run(const GroupNormSource& s, int64_t image, int64_t begin, int64_t end, Moments* out) {
    float* const mean = floats_.get() + 3 * slots_;
    float* const m2 = mean + whole_lines(s.channels);
    const float inverse = 1.f / static_cast<float>(end - begin);
    int64_t base = 0;
    for (int i = 0; i < s.parts; ++i) {
      const GroupNormPart& part = s.part[i];
      float* const pivot = floats_.get() + base;
      float* const s1 = pivot + slots_;
      float* const s2 = s1 + slots_;
      base += whole_lines(part.channels);
      sum_part<T>(s, part, image, begin, end, pivot, s1, s2);
      for_channel_vectors(
          part.channels, [&](int64_t c, int64_t slot, int lanes) __attribute__((always_inline)) {
            const Vec sum = load(s1 + slot);
            const Vec offset = sum * Vec(inverse);
            store_any(mean + part.first + c, lanes, load(pivot + slot) + offset);
            store_any(m2 + part.first + c, lanes, max(Vec(0.f), load(s2 + slot) - sum * offset));
          });
    }
    if (s.add != nullptr) {
      const T* add = static_cast<const T*>(s.add) + image * s.add_stride_n;
      for (int64_t c = 0; c < s.channels; ++c) mean[c] += to_float(add[c * s.add_stride_c]);
    }
    merge_channels(s, static_cast<double>(end - begin), mean, m2, out);
  }

 private:
  template <typename T>
  static void sum_part(const GroupNormSource& s, const GroupNormPart& part, int64_t image,
                       int64_t begin, int64_t end, float* pivot, float* s1, float* s2) {
    const ImageStrides& stride = part.stride;
    const T* const x = static_cast<const T*>(part.data) + image * stride.n;
    bool first = true;
    s.for_segments(begin, end, [&](int64_t row, int64_t at, int64_t n) {
      const T* p = x + row * stride.h + at * stride.w;
      if (first) {
        first = false;
        const int64_t slots = whole_lines(part.channels);
        std::fill(pivot, pivot + slots, 0.f);
        std::fill(s1, s1 + slots, 0.f);
        std::fill(s2, s2 + slots, 0.f);
        const int64_t leading = std::min<int64_t>(n, kRows);
        const Vec share(1.f / static_cast<float>(leading));
        for_channel_vectors(part.channels,
                            [&](int64_t c, int64_t slot, int lanes) __attribute__((always_inline)) {
                              Vec sum(0.f);
                              for (int64_t r = 0; r < leading; ++r)
                                sum += load_any(p + r * stride.w + c, lanes);
                              store(pivot + slot, sum * share);
                            });
      }
      const int64_t bytes = part.channels * static_cast<int64_t>(sizeof(T));
      const auto add = [&](auto run) { run(p, stride.w, n, part.channels, pivot, s1, s2); };
      if (stride.w < part.channels) {
        // Pixels that overlap (an expanded view): the memory after them is not theirs to touch.
        add(add_run<1, Ahead::kNothing, T>);
      } else if (kRows * bytes <= kLoadBytes) {
        add(add_run<kRows, Ahead::kLoad, T>);
      } else if (kRows * bytes <= kPrefetchBytes) {
        add(add_run<kRows, Ahead::kPrefetch, T>);
      } else if (4 * bytes <= kPrefetchBytes) {
        add(add_run<4, Ahead::kPrefetch, T>);
      } else if (2 * bytes <= kPrefetchBytes) {
        add(add_run<2, Ahead::kPrefetch, T>);
      } else {
        add(add_run<1, Ahead::kNothing, T>);
      }
    });
  }

  // Channels of equal counts to groups.
  static void merge_channels(const GroupNormSource& s, double pixels, const float* mean,
                             const float* m2, Moments* out) {
    const int64_t n = s.group_channels;
    for (int64_t g = 0; g < s.groups; ++g, mean += n, m2 += n) {
      // Around the first mean, so that floats are enough.
      const float reference = mean[0];
      const float offset =
          sum_of(n, [&](int64_t c) { return mean[c] - reference; }) / static_cast<float>(n);
      const float inside = sum_of(n, [&](int64_t c) { return m2[c]; });
      const float between = sum_of(n, [&](int64_t c) {
        const float d = mean[c] - reference - offset;
        return d * d;
      });
      out[g] = {pixels * static_cast<double>(n), static_cast<double>(reference) + offset,
                inside + pixels * between};
    }
  }

  int64_t slots_;
  AlignedFloats floats_;  // pivot, s1, s2 by slot; mean, m2 by channel
};

// ---- Planar and everything else: a vector holds neighbouring pixels of a channel -------------

// The shifted sums of one group, whose runs may have different pivots (by `add`).
class RunSums {
 public:
  // x: n contiguous elements.
  template <typename T>
  void add(const T* x, int64_t n, float pivot) {
    const Vec centre(pivot);
    Vec a[kUnroll];
    Vec b[kUnroll];
    for (int k = 0; k < kUnroll; ++k) {
      a[k] = a_[k];
      b[k] = b_[k];
    }
    for (int64_t i = 0; i < n;) {
      const int64_t block = std::min(n - i, kBlock - pending_);
      const int64_t stop = i + block;
      for (; i + kUnroll * kLanes <= stop; i += kUnroll * kLanes) {
        for (int k = 0; k < kUnroll; ++k) {
          const Vec d = load(x + i + k * kLanes) - centre;
          a[k] += d;
          b[k] = fma(d, d, b[k]);
        }
      }
      for (; i < stop; i += kLanes) {
        const Vec d =
            load_any(x + i, static_cast<int>(std::min<int64_t>(kLanes, stop - i)), pivot) - centre;
        a[0] += d;
        b[0] = fma(d, d, b[0]);
      }
      i = stop;
      pending_ += block;
      if (pending_ == kBlock) flush(a, b);
    }
    for (int k = 0; k < kUnroll; ++k) {
      a_[k] = a[k];
      b_[k] = b[k];
    }
    count_ += static_cast<double>(n);
  }

  Moments moments(double pivot) {
    flush(a_, b_);
    if (count_ == 0) return {};
    const double offset = s1_ / count_;
    return {count_, pivot + offset, std::max(s2_ - s1_ * offset, 0.)};
  }

 private:
  static constexpr int kUnroll = 4;
  static constexpr int64_t kBlock = 4096;  // float sums within, double beyond

  void flush(Vec* a, Vec* b) {
    s1_ += sum((a[0] + a[1]) + (a[2] + a[3]));
    s2_ += sum((b[0] + b[1]) + (b[2] + b[3]));
    for (int k = 0; k < kUnroll; ++k) a[k] = b[k] = Vec(0.f);
    pending_ = 0;
  }

  Vec a_[kUnroll] = {0.f, 0.f, 0.f, 0.f};
  Vec b_[kUnroll] = {0.f, 0.f, 0.f, 0.f};
  int64_t pending_ = 0;
  double s1_ = 0;
  double s2_ = 0;
  double count_ = 0;
};

// Of up to 64 elements.
template <typename T>
float mean_of_leading(const T* x, int64_t n, int64_t stride) {
  n = std::min<int64_t>(n, 64);
  float total = 0.f;
  if (stride == 1) {
    Vec v(0.f);
    for_lanes(n, [&](int64_t i, int lanes) { v += load_any(x + i, lanes); });
    total = sum(v);
  } else {
    for (int64_t i = 0; i < n; ++i) total += to_float(x[i * stride]);
  }
  return total / static_cast<float>(n);
}

template <typename T>
Moments group_item(const GroupNormSource& s, int64_t image, int64_t begin, int64_t end,
                   int64_t group) {
  constexpr int64_t kGather = 512;
  float gathered[kGather];
  RunSums sums;
  float pivot = 0.f;
  bool first = true;
  const int64_t c_end = (group + 1) * s.group_channels;
  for (int64_t c = group * s.group_channels; c < c_end;) {
    const GroupNormPart& part = s.part[s.parts == 2 && c >= s.part[1].first ? 1 : 0];
    const ImageStrides& stride = part.stride;
    const T* x = static_cast<const T*>(part.data) + image * stride.n + (c - part.first) * stride.c;
    const float add =
        s.add == nullptr
            ? 0.f
            : to_float(static_cast<const T*>(s.add)[image * s.add_stride_n + c * s.add_stride_c]);
    const bool unit = stride.w == 1 || s.width == 1;
    const auto run = [&](int64_t row, int64_t at, int64_t n) {
      const T* p = x + row * stride.h + at * stride.w;
      if (first) {
        first = false;
        pivot = mean_of_leading(p, n, unit ? 1 : stride.w) + add;
      }
      if (unit) {
        sums.add(p, n, pivot - add);
        return;
      }
      for (int64_t i = 0; i < n; i += kGather) {
        const int64_t count = std::min(kGather, n - i);
        for (int64_t k = 0; k < count; ++k) gathered[k] = to_float(p[(i + k) * stride.w]);
        sums.add(gathered, count, pivot - add);
      }
    };
    int64_t channels = 1;
    if (unit && s.add == nullptr && s.height == 1 && end - begin == s.width &&
        stride.c == s.width) {
      // Whole neighbouring channels are one run.
      channels = std::min(c_end, part.first + part.channels) - c;
      run(0, 0, channels * s.width);
    } else {
      s.for_segments(begin, end, run);
    }
    c += channels;
  }
  return sums.moments(pivot);
}

// ---- The two stages -------------------------------------------------------------------------

template <typename T>
void partial_moments(const GroupNormSource& s, int64_t chunks, int64_t chunk, Moments* partial) {
  const int64_t pixels = s.pixels();
  if (s.channels_last()) {
    const int64_t grain = std::max<int64_t>(1, kGrain / (chunk * s.channels));
    parallel_for(0, s.images * chunks, grain, [&](int64_t from, int64_t to) {
      ChannelsLastItem item(s);
      for (int64_t i = from; i < to; ++i) {
        const int64_t begin = i % chunks * chunk;
        item.run<T>(s, i / chunks, begin, std::min(begin + chunk, pixels), partial + i * s.groups);
      }
    });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / (chunk * s.group_channels));
  parallel_for(0, s.images * chunks * s.groups, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t item = i / s.groups;
      const int64_t begin = item % chunks * chunk;
      partial[i] =
          group_item<T>(s, item / chunks, begin, std::min(begin + chunk, pixels), i % s.groups);
    }
  });
}

// Merges `items` rows of [G] moments, and `out` if asked, into out: [G, 3].
void merge_items(const Moments* partial, int64_t items, int64_t groups, bool accumulate,
                 float* out) {
  for (int64_t g = 0; g < groups; ++g) {
    Moments old;
    if (accumulate) old = {out[3 * g], out[3 * g + 1], out[3 * g + 2]};
    double count = old.count;
    double sum = old.count * old.mean;
    for (int64_t i = 0; i < items; ++i) {
      const Moments& m = partial[i * groups + g];
      count += m.count;
      sum += m.count * m.mean;
    }
    const double mean = count > 0 ? sum / count : 0.;
    double m2 = old.m2 + old.count * (old.mean - mean) * (old.mean - mean);
    for (int64_t i = 0; i < items; ++i) {
      const Moments& m = partial[i * groups + g];
      m2 += m.m2 + m.count * (m.mean - mean) * (m.mean - mean);
    }
    out[3 * g] = static_cast<float>(count);
    out[3 * g + 1] = static_cast<float>(mean);
    out[3 * g + 2] = static_cast<float>(m2);
  }
}

template <typename T>
void run(const GroupNormStatsParams& p) {
  const GroupNormSource& s = p.source;
  const int64_t pixels = s.channels == 0 ? 0 : s.pixels();
  int64_t chunk = 1;
  int64_t chunks = 0;
  if (pixels > 0) {
    if (s.channels_last()) {
      chunk = std::clamp<int64_t>(kItem / s.channels, 128, kMaxPixels);
    } else {
      chunk = std::max<int64_t>(kItem / s.group_channels, 512);
    }
    chunks = (pixels + chunk - 1) / chunk;
    chunk = (pixels + chunks - 1) / chunks;
    chunks = (pixels + chunk - 1) / chunk;
  }
  std::vector<Moments> partial(s.images * chunks * s.groups);
  if (chunks > 0) partial_moments<T>(s, chunks, chunk, partial.data());

  const int64_t items = s.frames * chunks;
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, items * s.groups));
  parallel_for(0, s.images / s.frames, grain, [&](int64_t from, int64_t to) {
    for (int64_t clip = from; clip < to; ++clip) {
      merge_items(partial.data() + clip * items * s.groups, items, s.groups, p.accumulate,
                  p.out + clip * s.groups * 3);
    }
  });
}

}  // namespace

void group_norm_stats_cpu(const GroupNormStatsParams& p) {
  dispatch_dtype("group_norm_stats", p.source.dtype,
                 [&](auto tag) { run<typename decltype(tag)::type>(p); });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
