#include "accelrt/parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace accelrt {
namespace {

std::atomic<ParallelBackend> g_backend{nullptr};
std::atomic<int> g_threads{0};

void builtin_backend(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  const int wanted = g_threads.load();
  const int64_t threads = wanted > 0 ? wanted : std::max(1u, std::thread::hardware_concurrency());
  const int64_t total = end - begin;
  const int64_t parts = std::min<int64_t>(threads, (total + grain - 1) / grain);
  if (parts <= 1) {
    body(begin, end, context);
    return;
  }
  std::vector<std::thread> workers;
  workers.reserve(parts - 1);
  for (int64_t i = 1; i < parts; ++i) {
    workers.emplace_back(body, begin + total * i / parts, begin + total * (i + 1) / parts, context);
  }
  body(begin, begin + total / parts, context);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace

void set_parallel_backend(ParallelBackend backend) { g_backend.store(backend); }

void set_num_threads(int threads) { g_threads.store(threads); }

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  const ParallelBackend backend = g_backend.load(std::memory_order_relaxed);
  (backend != nullptr ? backend : builtin_backend)(begin, end, grain, body, context);
}

}  // namespace accelrt
