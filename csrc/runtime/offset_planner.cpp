#include "runtime/offset_planner.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "accelrt/check.h"

namespace accelrt {
namespace {

// Visits of placed buffers that the retries of one plan may cost: some tens of milliseconds.
constexpr int64_t kRetryWork = 20'000'000;
constexpr int64_t kMaxRetries = 400;

struct Placed {
  int64_t offset;
  int64_t end;
  int64_t first;
  int64_t last;
};

struct Layout {
  std::vector<int64_t> offsets;
  int64_t slab = std::numeric_limits<int64_t>::max();
};

std::vector<BufferLife> checked(const std::vector<BufferLife>& buffers, int64_t alignment) {
  ACCELRT_CHECK(alignment >= 1, "plan_offsets: alignment is ", alignment,
                "; it must be at least 1");
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  std::vector<BufferLife> aligned = buffers;
  int64_t sum = 0;
  for (size_t i = 0; i < aligned.size(); ++i) {
    BufferLife& b = aligned[i];
    ACCELRT_CHECK(b.size >= 1, "plan_offsets: sizes[", i, "] is ", b.size,
                  "; a buffer has at least one byte");
    ACCELRT_CHECK(b.first >= 0, "plan_offsets: firsts[", i, "] is ", b.first,
                  "; steps are not negative");
    ACCELRT_CHECK(b.last >= b.first, "plan_offsets: lasts[", i, "] is ", b.last, ", before firsts[",
                  i, "], ", b.first);
    ACCELRT_CHECK(b.size <= kMax - (alignment - 1), "plan_offsets: sizes[", i, "] is ", b.size,
                  "; aligned to ", alignment, " it overflows 64 bits");
    b.size = (b.size + alignment - 1) / alignment * alignment;
    ACCELRT_CHECK(b.size <= kMax - sum,
                  "plan_offsets: the sum of sizes overflows 64 bits at sizes[", i, "], ",
                  buffers[i].size);
    sum += b.size;
  }
  return aligned;
}

int64_t peak_of_lives(const std::vector<BufferLife>& buffers) {
  // (step, bytes): deaths sort before births at one step, since their bytes are negative.
  // `last` counts as alive, so a death is an event of the odd half step after it.
  std::vector<std::pair<uint64_t, int64_t>> events;
  events.reserve(2 * buffers.size());
  for (const BufferLife& b : buffers) {
    events.emplace_back(2 * static_cast<uint64_t>(b.first), b.size);
    events.emplace_back(2 * static_cast<uint64_t>(b.last) + 1, -b.size);
  }
  std::sort(events.begin(), events.end());
  int64_t live = 0;
  int64_t peak = 0;
  for (const auto& [step, bytes] : events) {
    live += bytes;
    peak = std::max(peak, live);
  }
  return peak;
}

// Each buffer in turn into the smallest gap that fits, the lowest among equals.
Layout place(const std::vector<BufferLife>& buffers, const std::vector<int32_t>& order) {
  Layout layout;
  layout.offsets.resize(buffers.size());
  layout.slab = 0;
  std::vector<Placed> placed;  // by offset
  placed.reserve(buffers.size());
  for (const int32_t index : order) {
    const BufferLife& b = buffers[index];
    int64_t best = -1;
    int64_t best_gap = std::numeric_limits<int64_t>::max();
    int64_t top = 0;  // end of what lies below and lives at the same time
    for (const Placed& p : placed) {
      if (p.last < b.first || p.first > b.last) continue;
      const int64_t gap = p.offset - top;
      if (gap >= b.size && gap < best_gap) {
        best = top;
        best_gap = gap;
        if (gap == b.size) break;
      }
      top = std::max(top, p.end);
    }
    const int64_t offset = best >= 0 ? best : top;
    layout.offsets[index] = offset;
    layout.slab = std::max(layout.slab, offset + b.size);
    const auto above =
        std::upper_bound(placed.begin(), placed.end(), offset,
                         [](int64_t value, const Placed& p) { return value < p.offset; });
    placed.insert(above, Placed{offset, offset + b.size, b.first, b.last});
  }
  return layout;
}

template <typename Key>
std::vector<int32_t> sorted_by(size_t count, const Key& key) {
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return key(a) < key(b); });
  return order;
}

}  // namespace

double OffsetPlan::fragmentation() const {
  if (bound_bytes == 0) return 0.0;
  return static_cast<double>(slab_bytes) / static_cast<double>(bound_bytes) - 1.0;
}

OffsetPlan plan_offsets(const std::vector<BufferLife>& buffers, int64_t alignment) {
  const std::vector<BufferLife> lives = checked(buffers, alignment);
  const size_t count = lives.size();
  ACCELRT_CHECK(count <= static_cast<size_t>(std::numeric_limits<int32_t>::max()),
                "plan_offsets: ", count, " buffers; at most 2^31 - 1");
  OffsetPlan plan;
  if (count == 0) return plan;
  plan.bound_bytes = peak_of_lives(lives);

  const auto length = [&](int32_t i) { return lives[i].last - lives[i].first; };
  const auto area = [&](int32_t i) {
    return static_cast<double>(lives[i].size) * (static_cast<double>(length(i)) + 1.0);
  };
  Layout best;
  std::vector<int32_t> best_order;
  const auto attempt = [&](const std::vector<int32_t>& order) {
    Layout layout = place(lives, order);
    if (layout.slab < best.slab) {
      best = std::move(layout);
      best_order = order;
    }
  };
  const auto optimal = [&] { return best.slab == plan.bound_bytes; };

  attempt(sorted_by(count, [&](int32_t i) { return std::pair(-lives[i].size, -length(i)); }));
  if (!optimal()) attempt(sorted_by(count, [&](int32_t i) { return -area(i); }));
  if (!optimal()) {
    attempt(sorted_by(count, [&](int32_t i) { return std::pair(lives[i].first, -lives[i].size); }));
  }
  if (!optimal()) {
    attempt(sorted_by(count, [&](int32_t i) { return std::pair(-length(i), -lives[i].size); }));
  }

  // What ends highest was placed too late to find a good gap: place it first, again and again.
  const int64_t visits = static_cast<int64_t>(count) * static_cast<int64_t>(count) / 2;
  const int64_t retries = std::min(kMaxRetries, kRetryWork / std::max<int64_t>(1, visits));
  std::vector<int32_t> order = best_order;
  Layout last = best;
  for (int64_t retry = 0; retry < retries && !optimal(); ++retry) {
    std::stable_partition(order.begin(), order.end(),
                          [&](int32_t i) { return last.offsets[i] + lives[i].size == last.slab; });
    last = place(lives, order);
    if (last.slab < best.slab) best = last;
  }

  plan.offsets = std::move(best.offsets);
  plan.slab_bytes = best.slab;
  return plan;
}

}  // namespace accelrt
