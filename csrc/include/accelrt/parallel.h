// parallel_for over a pluggable backend: torch's thread pool when loaded by the Python
// bindings, the calling thread plus std::threads otherwise.
#pragma once

#include <atomic>
#include <cstdint>

namespace accelrt {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelBackend = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body,
                                 void* context);

// Replaces the backend; null restores the built-in one. Not meant to race with kernels.
void set_parallel_backend(ParallelBackend backend);

// Threads of the built-in backend (default: the hardware's).
void set_num_threads(int threads);

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

// Calls fn(begin, end) on disjoint ranges of at least `grain` indices. fn must not throw.
template <typename Fn>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Fn& fn) {
  if (end <= begin) return;
  parallel_for_raw(
      begin, end, grain < 1 ? 1 : grain,
      [](int64_t b, int64_t e, void* context) { (*static_cast<const Fn*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

// Hands out the indices [0, count) to the calls of a parallel_for: each has those of its own range,
// then takes what others have left, so that threads need not be equally fast. For kernels whose
// results do not depend on who computes what.
class SharedIndices {
 public:
  // body(next): next() is the next index, or -1.
  template <typename Fn>
  static void run(int64_t count, int64_t grain, const Fn& body) {
    SharedIndices shared;
    parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      Range own;
      Range* const range = shared.publish(begin, end, own);
      int other = -1;
      body([&]() -> int64_t {
        if (const int64_t index = range->take(); index >= 0) return index;
        const int used = shared.used_.load();
        while (++other < used && other < kRanges) {
          const int64_t index = shared.ranges_[other].take();
          if (index < 0) continue;
          --other;  // and the next one from here again
          return index;
        }
        other = kRanges;
        return -1;
      });
    });
  }

 private:
  static constexpr int kRanges = 64;  // whose indices others take; a further one keeps its own

  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> end{0};  // set last
    int64_t take() {
      if (next.load(std::memory_order_relaxed) >= end.load(std::memory_order_acquire)) return -1;
      const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      return index < end.load(std::memory_order_relaxed) ? index : -1;
    }
  };

  Range* publish(int64_t begin, int64_t end, Range& own) {
    const int slot = used_.fetch_add(1);
    Range& range = slot < kRanges ? ranges_[slot] : own;
    range.next.store(begin, std::memory_order_relaxed);
    range.end.store(end, std::memory_order_release);
    return &range;
  }

  std::atomic<int> used_{0};
  Range ranges_[kRanges];
};

}  // namespace accelrt
