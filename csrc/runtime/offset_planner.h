// Offsets in one slab for buffers whose lives are known.
#pragma once

#include <cstdint>
#include <vector>

namespace accelrt {

// A buffer of `size` bytes, alive in the steps first..last, both included.
struct BufferLife {
  int64_t size;
  int64_t first;
  int64_t last;
};

struct OffsetPlan {
  std::vector<int64_t> offsets;  // one per buffer, multiples of the alignment
  int64_t slab_bytes = 0;        // what the offsets need
  int64_t bound_bytes = 0;       // most bytes alive in any step: no plan needs less

  // By what share the slab is larger than the bound.
  double fragmentation() const;
};

// Places the buffers greedily, each in the smallest gap that the placed ones alive with it
// leave: by size, by size times length of life, by birth and by length of life. Keeps the
// smallest slab, and while it is above the bound, tries again with the highest buffer first (a
// limited number of times: some tens of milliseconds for thousands of buffers).
// Throws Error if a size is below 1, a life is empty or negative, the alignment is below 1, or
// the sum of all sizes overflows int64.
OffsetPlan plan_offsets(const std::vector<BufferLife>& buffers, int64_t alignment);

}  // namespace accelrt
