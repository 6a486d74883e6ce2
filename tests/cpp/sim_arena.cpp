// The arena under the sanitizers: threads that share one, its end before that of its blocks,
// and a run that follows the planner's offsets.
#include <atomic>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "accelrt/check.h"
#include "runtime/arena.h"
#include "runtime/offset_planner.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

constexpr dlpack::Device kHost{dlpack::kDLCPU, 0};

void give_slab(Arena& arena, int64_t bytes) {
  auto* memory = static_cast<unsigned char*>(::operator new(bytes, std::align_val_t(64)));
  arena.set_slab(memory, bytes, std::shared_ptr<void>(memory, [](void* pointer) {
                   ::operator delete(pointer, std::align_val_t(64));
                 }));
}

// A block whose bytes all hold one stamp: a second owner of any of them would show.
struct Stamped {
  dlpack::ManagedTensor* tensor;
  unsigned char stamp;

  void free() {
    const auto* bytes = static_cast<const unsigned char*>(tensor->dl_tensor.data);
    for (int64_t i = 0; i < tensor->dl_tensor.shape[0]; ++i) {
      ACCELRT_CHECK(bytes[i] == stamp, "byte ", i, " of a block is ", int{bytes[i]}, " instead of ",
                    int{stamp});
    }
    tensor->deleter(tensor);
  }
};

void stress(int64_t threads, int64_t rounds) {
  auto arena = std::make_unique<Arena>(kHost);
  give_slab(*arena, 64 * 1024);
  std::mutex mutex;
  std::vector<Stamped> shared;  // freed by whichever thread draws them
  std::atomic<int> failures{0};
  const auto work = [&](int64_t thread) {
    std::mt19937 random(static_cast<uint32_t>(thread));
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t bytes = 1 + random() % 8000;
      const auto stamp = static_cast<unsigned char>(random());
      if (round % 16 == 0) arena->return_free_pages();  // those of living blocks keep their stamps
      if (ArenaBlock block = arena->allocate(bytes, random() % 2 ? 64 * (random() % 1024) : -1)) {
        std::memset(block.data(), stamp, bytes);
        dlpack::ManagedTensor* tensor =
            to_dlpack(std::move(block), {dlpack::kDLUInt, 8, 1}, {bytes}, {1});
        const std::lock_guard<std::mutex> lock(mutex);
        shared.push_back({tensor, stamp});
      }
      if (thread == 0 && round % 100 == 99) give_slab(*arena, 64 * (512 + random() % 1024));
      const std::lock_guard<std::mutex> lock(mutex);
      if (shared.empty() || random() % 2) continue;
      std::swap(shared[random() % shared.size()], shared.back());
      try {
        shared.back().free();
      } catch (const Error&) { ++failures; }
      shared.pop_back();
    }
  };
  std::vector<std::thread> workers;
  for (int64_t i = 0; i < threads; ++i) workers.emplace_back(work, i);
  for (std::thread& worker : workers) worker.join();
  ACCELRT_CHECK(failures == 0, failures, " blocks were overwritten");
  ACCELRT_CHECK(arena->counters().blocks == static_cast<int64_t>(shared.size()),
                arena->counters().blocks, " blocks alive instead of ", shared.size());
  arena.reset();
  for (Stamped& block : shared) block.free();
}

void follow_plan(int64_t buffers) {
  std::mt19937 random(1);
  std::vector<BufferLife> lives;
  for (int64_t i = 0; i < buffers; ++i) {
    lives.push_back(
        {1 + static_cast<int64_t>(random() % 5000), i, i + static_cast<int64_t>(random() % 12)});
  }
  const OffsetPlan plan = plan_offsets(lives, 64);
  Arena arena(kHost);
  give_slab(arena, plan.slab_bytes);
  std::vector<ArenaBlock> blocks(lives.size());
  for (int64_t step = 0; step < buffers; ++step) {
    blocks[step] = arena.allocate(lives[step].size, plan.offsets[step]);
    ACCELRT_CHECK(blocks[step], "no place for buffer ", step);
    std::memset(blocks[step].data(), 1, lives[step].size);
    for (int64_t i = 0; i <= step; ++i) {
      if (lives[i].last == step) blocks[i].free();
    }
  }
  const ArenaCounters counters = arena.counters();
  ACCELRT_CHECK(counters.misplaced == 0 && counters.refused == 0, counters.misplaced,
                " misplaced, ", counters.refused, " refused");
  ACCELRT_CHECK(counters.peak_bytes == plan.bound_bytes, "peak ", counters.peak_bytes,
                " instead of ", plan.bound_bytes);
}

const Register kArena("arena", [](const Arguments& a) {
  stress(a.integer("threads"), a.integer("rounds"));
  follow_plan(a.integer("buffers"));
});

}  // namespace
}  // namespace accelrt::sim
