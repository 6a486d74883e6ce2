// One slab of memory, handed out in blocks, with exact knowledge of what is alive.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "accelrt/dlpack.h"

namespace accelrt {

namespace detail {
struct ArenaState;
struct ArenaSlab;
}  // namespace detail

struct ArenaCounters {
  int64_t live_bytes = 0;     // aligned bytes of the blocks alive, in every slab
  int64_t peak_bytes = 0;     // most of them since reset_peak()
  int64_t blocks = 0;         // alive
  int64_t misplaced = 0;      // blocks that are not where they were preferred
  int64_t refused = 0;        // allocations that fitted nowhere
  int64_t refused_bytes = 0;  // and their aligned sizes
};

// A range of a slab, free again when this object dies, on any thread and also after its arena.
class ArenaBlock {
 public:
  ArenaBlock() = default;
  ArenaBlock(ArenaBlock&& other) noexcept = default;
  ArenaBlock& operator=(ArenaBlock&& other) noexcept;
  ~ArenaBlock() { free(); }

  explicit operator bool() const { return slab_ != nullptr; }
  void* data() const;
  int64_t offset() const { return offset_; }
  int64_t bytes() const { return bytes_; }  // a multiple of the alignment
  dlpack::Device device() const;
  void free();

 private:
  friend class Arena;
  std::shared_ptr<detail::ArenaState> state_;
  std::shared_ptr<detail::ArenaSlab> slab_;
  int64_t offset_ = 0;
  int64_t bytes_ = 0;
};

// Hands out blocks of a slab that it does not own. All members may be called from any thread.
//
// A freed range is handed out again at once, so work that is still queued on it must run before
// what the next owner queues: on CUDA an arena serves one stream.
class Arena {
 public:
  // alignment: of every block, a power of two; 0 is the device's default, 64 or (CUDA) 512.
  explicit Arena(dlpack::Device device, int64_t alignment = 0);

  // New blocks come from this memory from now on. Older blocks stay valid: `owner` of a slab dies
  // when the slab has been replaced and its last block has died.
  // Throws Error if the base is not aligned or `bytes` is negative.
  void set_slab(void* base, int64_t bytes, std::shared_ptr<void> owner);

  // No slab from now on.
  void release();

  // At `preferred` if that is an aligned offset and its range is free, else in the smallest gap
  // that fits; an empty block if there is none. Throws Error if `bytes` is below 1.
  ArenaBlock allocate(int64_t bytes, int64_t preferred = -1);

  // Gives the whole pages of the free ranges back to the system, which makes them anew when they
  // are written to, as zeros. For memory of the CPU that no file is behind; elsewhere, and where
  // the system has no such call, nothing happens. Returns the bytes given back or never touched.
  int64_t return_free_pages();

  int64_t slab_bytes() const;
  int64_t alignment() const;
  dlpack::Device device() const;
  ArenaCounters counters() const;
  void reset_peak();

 private:
  std::shared_ptr<detail::ArenaState> state_;
};

// A tensor over the block, which is freed by the tensor's deleter. Strides are in elements.
dlpack::ManagedTensor* to_dlpack(ArenaBlock block, dlpack::DataType dtype,
                                 std::vector<int64_t> shape, std::vector<int64_t> strides);

}  // namespace accelrt
