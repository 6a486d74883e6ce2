// What the two arithmetics of temporal_attention_cpu.cpp share: the units of work, their memory,
// and the fetching of their rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "accelrt/aligned.h"
#include "accelrt/parallel.h"
#include "accelrt/streaming.h"
#include "accelrt/vec.h"
#include "kernels/temporal_attention/temporal_attention.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Groups of heads whose channels fill whole vectors and make rows of several cache lines, as
// long as the tiles stay in the L2 cache.
struct Grouping {
  explicit Grouping(const TemporalAttentionParams& p) {
    const int lanes = kLanes;
    const int64_t whole = lanes / std::gcd(lanes, p.head_dim);
    constexpr int64_t kRowBytes = 256;
    constexpr int64_t kMostFloats = 65536;
    const int64_t head_floats = int64_t{2} * (p.frames + p.key_frames) * p.head_dim;
    auto fits = [&](int64_t n) { return n <= p.heads && n * head_floats <= kMostFloats; };
    if (fits(whole)) heads = whole;
    while (heads * p.head_dim * size_of(p.dtype) < kRowBytes && fits(heads + whole)) heads += whole;
    groups = (p.heads + heads - 1) / heads;
    const int64_t elements = p.batch * p.pixels * p.frames * p.heads * p.head_dim;
    streams = p.out != p.q && worth_streaming(elements * size_of(p.dtype));
  }
  int64_t heads = 1;   // of a group
  int64_t groups = 1;  // per pixel
  bool streams;        // the results pass by the caches
};

// Which pixel and heads a unit is.
struct Unit {
  Unit(const TemporalAttentionParams& p, const Grouping& plan, int64_t index)
      : batch(index / plan.groups / p.pixels),
        pixel(index / plan.groups % p.pixels),
        first(index % plan.groups * plan.heads),
        heads(static_cast<int>(std::min(plan.heads, p.heads - first))) {}

  template <typename T>
  const T* tile(const TemporalAttentionParams& p, const void* data,
                const FrameStrides& stride) const {
    return static_cast<const T*>(data) + batch * stride.batch + pixel * stride.pixel +
           first * p.head_dim;
  }

  int64_t batch;
  int64_t pixel;
  int64_t first;  // head
  int heads;
};

// The rows of q, k and v of a unit, one after the other in the scratch, `row` elements apart.
struct Rows {
  Rows(const TemporalAttentionParams& p, int64_t row) : row(row), k(p.frames), v(k + p.key_frames) {
    count = v + p.key_frames;
  }
  template <typename T>
  const T* first(const T* rows, int64_t index) const {
    return rows + index * row;
  }
  int64_t row;
  int k;  // index of its first row
  int v;
  int count;
};

// Brings the rows of a unit to the scratch, a few per call, and asks for those of the unit after
// it. They are short and far apart, which defeats the hardware's prefetchers; and often a large
// power of two apart, so that all of them fall into the same few sets of the first-level cache:
// there they would push each other out.
template <typename T>
class Fetcher {
 public:
  // `calls` calls bring all of them.
  Fetcher(const TemporalAttentionParams& p, const Rows& rows, const Unit& unit, const Unit& after,
          int calls, T* to)
      : tiles_{{unit.tile<T>(p, p.q, p.q_stride), p.q_stride.frame},
               {unit.tile<T>(p, p.k, p.k_stride), p.k_stride.frame},
               {unit.tile<T>(p, p.v, p.v_stride), p.v_stride.frame}},
        after_{after.tile<T>(p, p.q, p.q_stride), after.tile<T>(p, p.k, p.k_stride),
               after.tile<T>(p, p.v, p.v_stride)},
        rows_(rows),
        width_(unit.heads * p.head_dim),
        after_width_(after.heads * p.head_dim),
        step_((rows.count + calls - 1) / calls),
        to_(to) {}

  void operator()() {
    const int end = std::min(next_ + step_, rows_.count);
    for (; next_ < end; ++next_) {
      const int tile = next_ >= rows_.v ? 2 : next_ >= rows_.k ? 1 : 0;
      const int first = tile == 2 ? rows_.v : tile == 1 ? rows_.k : 0;
      const int64_t offset = (next_ - first) * tiles_[tile].stride;
      const T* const later = after_[tile] + offset;
      for (int64_t c = 0; c < after_width_; c += kChunk) __builtin_prefetch(later + c, 0, 2);
      __builtin_prefetch(later + after_width_ - 1, 0, 2);
      const T* const from = tiles_[tile].data + offset;
      T* const to = to_ + next_ * rows_.row;
      int64_t c = 0;
      for (; c + kChunk <= width_; c += kChunk) std::memcpy(to + c, from + c, 64);
      if (c < width_) std::memcpy(to + c, from + c, static_cast<size_t>(width_ - c) * sizeof(T));
    }
  }

  void all() {
    while (next_ < rows_.count) (*this)();
  }

 private:
  struct Tile {
    const T* data;
    int64_t stride;
  };
  static constexpr int64_t kChunk = 64 / sizeof(T);

  Tile tiles_[3];
  const T* after_[3];
  Rows rows_;
  int64_t width_;
  int64_t after_width_;
  int step_;
  T* to_;
  int next_ = 0;
};

// Calls fn(unit, its rows, the fetcher of the next unit, scratch of plan.floats) for all units, in
// parallel; plan.calls is how often fn calls the fetcher.
template <typename T, typename Plan, typename Fn>
void for_units(const TemporalAttentionParams& p, const Plan& plan, const Fn& fn) {
  const int64_t units = p.batch * p.pixels * plan.groups;
  const int64_t unit_flops = 4 * plan.heads * p.head_dim * p.frames * p.key_frames;
  constexpr int64_t kGrainFlops = 1 << 20;
  // An odd number of lines apart, so that rows fall into different sets, and room for a vector.
  const int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t lines = (plan.heads * p.head_dim + line - 1) / line + 1;
  const Rows rows(p, (lines | 1) * line);
  constexpr int64_t kPast = 16;  // rows that a block of keys may read past the last
  const int64_t raw = (rows.count + kPast) * (lines | 1) * kLineFloats;
  const int64_t own = whole_lines(plan.floats);
  parallel_for(0, units, kGrainFlops / unit_flops, [&](int64_t begin, int64_t end) {
    const AlignedFloats scratch = make_aligned(own + 2 * raw);
    // The padding of the tiles must hold numbers.
    std::memset(scratch.get(), 0, static_cast<size_t>(own + 2 * raw) * sizeof(float));
    T* now = reinterpret_cast<T*>(scratch.get() + own);
    T* then = reinterpret_cast<T*>(scratch.get() + own + raw);
    const auto unit = [&](int64_t i) { return Unit(p, plan, std::min(i, end - 1)); };
    Fetcher<T>(p, rows, unit(begin), unit(begin + 1), rows.count, now).all();
    for (int64_t i = begin; i < end; ++i) {
      Fetcher<T> fetch(p, rows, unit(i + 1), unit(i + 2), plan.calls, then);
      fn(unit(i), rows, now, fetch, scratch.get());
      fetch.all();
      std::swap(now, then);
    }
    end_streaming(plan.streams);
  });
}

}  // namespace
}  // namespace ACCELRT_ISA
}  // namespace accelrt
