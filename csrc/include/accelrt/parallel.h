// parallel_for over a pluggable backend: torch's thread pool when loaded by the Python
// bindings, the calling thread plus std::threads otherwise.
#pragma once

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

}  // namespace accelrt
