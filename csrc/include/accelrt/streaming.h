// Results that no cache would hold until they are read: stored past the caches, which saves
// reading the lines that they fill.
#pragma once

#include <cstdint>

#include "accelrt/vec.h"

namespace accelrt {

// Of the last-level cache, at most 32 MiB: of larger ones a core has a share.
int64_t last_level_cache_bytes();

namespace ACCELRT_ISA {

// Of `bytes` of results. Results that take the place of an input lie in the cache already.
inline bool worth_streaming(int64_t bytes) { return bytes > last_level_cache_bytes(); }

inline bool starts_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// What streamed stores need before another thread reads their results.
inline void end_streaming(bool streamed) {
#if defined(__SSE2__)
  if (streamed) _mm_sfence();
#else
  static_cast<void>(streamed);
#endif
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
