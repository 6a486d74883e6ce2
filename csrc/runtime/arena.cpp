#include "runtime/arena.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "accelrt/check.h"

namespace accelrt {
namespace detail {

struct ArenaState {
  dlpack::Device device{};
  int64_t alignment = 0;
  mutable std::mutex mutex;  // guards all that follows, and the gaps of every slab
  std::shared_ptr<ArenaSlab> slab;
  ArenaCounters counters;
};

struct ArenaSlab {
  unsigned char* base = nullptr;
  int64_t bytes = 0;
  std::shared_ptr<void> owner;
  std::map<int64_t, int64_t> gaps;  // offset -> length; no two touch
};

}  // namespace detail

namespace {

using detail::ArenaSlab;

// The offset of a gap that holds the whole range, or -1.
int64_t gap_around(const ArenaSlab& slab, int64_t offset, int64_t bytes) {
  auto gap = slab.gaps.upper_bound(offset);
  if (gap == slab.gaps.begin()) return -1;
  --gap;
  const bool inside = gap->second - (offset - gap->first) >= bytes;
  return inside ? gap->first : -1;
}

// The offset of the smallest gap that fits, the lowest among equals, or -1.
int64_t best_gap(const ArenaSlab& slab, int64_t bytes) {
  int64_t best = -1;
  int64_t smallest = std::numeric_limits<int64_t>::max();
  for (const auto& [offset, length] : slab.gaps) {
    if (length >= bytes && length < smallest) {
      best = offset;
      smallest = length;
    }
  }
  return best;
}

void cut(ArenaSlab& slab, int64_t gap_offset, int64_t offset, int64_t bytes) {
  const auto gap = slab.gaps.find(gap_offset);
  const int64_t gap_end = gap->first + gap->second;
  const int64_t before = offset - gap->first;
  if (before > 0) {
    gap->second = before;
  } else {
    slab.gaps.erase(gap);
  }
  const int64_t end = offset + bytes;
  if (end < gap_end) slab.gaps.emplace(end, gap_end - end);
}

void give_back(ArenaSlab& slab, int64_t offset, int64_t bytes) {
  auto next = slab.gaps.lower_bound(offset);
  if (next != slab.gaps.end() && offset + bytes == next->first) {
    bytes += next->second;
    next = slab.gaps.erase(next);
  }
  if (next != slab.gaps.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += bytes;
      return;
    }
  }
  slab.gaps.emplace_hint(next, offset, bytes);
}

int64_t default_alignment(dlpack::Device device) {
  return device.type == dlpack::kDLCUDA ? 512 : 64;
}

struct TensorContext {
  ArenaBlock block;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  dlpack::ManagedTensor tensor;
};

}  // namespace

ArenaBlock& ArenaBlock::operator=(ArenaBlock&& other) noexcept {
  if (this != &other) {
    free();
    state_ = std::move(other.state_);
    slab_ = std::move(other.slab_);
    offset_ = other.offset_;
    bytes_ = other.bytes_;
  }
  return *this;
}

void* ArenaBlock::data() const { return slab_ == nullptr ? nullptr : slab_->base + offset_; }

dlpack::Device ArenaBlock::device() const {
  ACCELRT_CHECK(state_ != nullptr, "an empty arena block has no device");
  return state_->device;
}

void ArenaBlock::free() {
  if (slab_ == nullptr) return;
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    give_back(*slab_, offset_, bytes_);
    state_->counters.live_bytes -= bytes_;
    --state_->counters.blocks;
  }
  // Outside of the lock: the owner of a slab may wait for other locks when it dies.
  slab_.reset();
  state_.reset();
}

Arena::Arena(dlpack::Device device, int64_t alignment)
    : state_(std::make_shared<detail::ArenaState>()) {
  ACCELRT_CHECK(device.type == dlpack::kDLCPU || device.type == dlpack::kDLCUDA,
                "arena: DLPack device type ", device.type, "; allowed: 1 (CPU), 2 (CUDA)");
  if (alignment == 0) alignment = default_alignment(device);
  ACCELRT_CHECK(alignment >= 1 && (alignment & (alignment - 1)) == 0, "arena: alignment ",
                alignment, " is no power of two");
  state_->device = device;
  state_->alignment = alignment;
}

void Arena::set_slab(void* base, int64_t bytes, std::shared_ptr<void> owner) {
  ACCELRT_CHECK(bytes >= 0, "arena: a slab of ", bytes, " bytes");
  ACCELRT_CHECK(reinterpret_cast<uintptr_t>(base) % state_->alignment == 0, "arena: the slab at ",
                base, " is not aligned to ", state_->alignment);
  auto slab = std::make_shared<ArenaSlab>();
  slab->base = static_cast<unsigned char*>(base);
  slab->bytes = bytes / state_->alignment * state_->alignment;
  slab->owner = std::move(owner);
  if (slab->bytes > 0) slab->gaps.emplace(0, slab->bytes);
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->slab.swap(slab);  // the lock is released before the old one dies
}

void Arena::release() {
  std::shared_ptr<ArenaSlab> slab;
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->slab.swap(slab);
}

ArenaBlock Arena::allocate(int64_t bytes, int64_t preferred) {
  ACCELRT_CHECK(bytes >= 1, "arena: an allocation of ", bytes, " bytes");
  const int64_t alignment = state_->alignment;
  const int64_t largest = std::numeric_limits<int64_t>::max() / alignment * alignment;
  const int64_t size = bytes > largest ? largest : (bytes + alignment - 1) / alignment * alignment;

  ArenaBlock block;
  const std::lock_guard<std::mutex> lock(state_->mutex);
  ArenaCounters& counters = state_->counters;
  const std::shared_ptr<ArenaSlab>& slab = state_->slab;
  int64_t gap = -1;
  int64_t offset = -1;
  if (slab != nullptr) {
    if (preferred >= 0 && preferred % alignment == 0) {
      gap = gap_around(*slab, preferred, size);
      offset = preferred;
    }
    if (gap < 0) offset = gap = best_gap(*slab, size);
  }
  if (gap < 0) {
    ++counters.refused;
    counters.refused_bytes += size;
    return block;
  }
  cut(*slab, gap, offset, size);
  if (preferred >= 0 && offset != preferred) ++counters.misplaced;
  ++counters.blocks;
  counters.live_bytes += size;
  counters.peak_bytes = std::max(counters.peak_bytes, counters.live_bytes);
  block.state_ = state_;
  block.slab_ = slab;
  block.offset_ = offset;
  block.bytes_ = size;
  return block;
}

int64_t Arena::return_free_pages() {
  int64_t returned = 0;
#ifdef __linux__
  if (state_->device.type != dlpack::kDLCPU) return 0;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->slab == nullptr) return 0;
  const auto base = reinterpret_cast<uintptr_t>(state_->slab->base);
  for (const auto& [offset, length] : state_->slab->gaps) {
    const uintptr_t begin = (base + offset + page - 1) / page * page;
    const uintptr_t end = (base + offset + length) / page * page;
    if (begin >= end) continue;
    if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED) == 0) {
      returned += static_cast<int64_t>(end - begin);
    }
  }
#endif
  return returned;
}

int64_t Arena::slab_bytes() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->slab == nullptr ? 0 : state_->slab->bytes;
}

int64_t Arena::alignment() const { return state_->alignment; }

dlpack::Device Arena::device() const { return state_->device; }

ArenaCounters Arena::counters() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->counters;
}

void Arena::reset_peak() {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->counters.peak_bytes = state_->counters.live_bytes;
}

dlpack::ManagedTensor* to_dlpack(ArenaBlock block, dlpack::DataType dtype,
                                 std::vector<int64_t> shape, std::vector<int64_t> strides) {
  ACCELRT_CHECK(block, "to_dlpack: the block is empty");
  ACCELRT_CHECK(shape.size() == strides.size(), "to_dlpack: ", shape.size(), " sizes and ",
                strides.size(), " strides");
  int64_t last = 0;  // the highest element's index
  for (size_t d = 0; d < shape.size(); ++d) {
    ACCELRT_CHECK(shape[d] >= 1 && strides[d] >= 0, "to_dlpack: dimension ", d, " has size ",
                  shape[d], " and stride ", strides[d]);
    int64_t reach = 0;
    const bool fits = !__builtin_mul_overflow(shape[d] - 1, strides[d], &reach) &&
                      !__builtin_add_overflow(last, reach, &last);
    ACCELRT_CHECK(fits, "to_dlpack: the extent overflows 64 bits in dimension ", d);
  }
  const int64_t item = static_cast<int64_t>(dtype.bits) * dtype.lanes / 8;
  ACCELRT_CHECK(item >= 1 && last < block.bytes() / item, "to_dlpack: ", last + 1, " elements of ",
                item, " bytes exceed a block of ", block.bytes());
  auto context = std::make_unique<TensorContext>();
  context->block = std::move(block);
  context->shape = std::move(shape);
  context->strides = std::move(strides);
  dlpack::Tensor& t = context->tensor.dl_tensor;
  t.data = context->block.data();
  t.device = context->block.device();
  t.ndim = static_cast<int32_t>(context->shape.size());
  t.dtype = dtype;
  t.shape = context->shape.data();
  t.strides = context->strides.data();
  t.byte_offset = 0;
  context->tensor.manager_ctx = context.get();
  context->tensor.deleter = [](dlpack::ManagedTensor* self) {
    delete static_cast<TensorContext*>(self->manager_ctx);
  };
  return &context.release()->tensor;
}

}  // namespace accelrt
