// A small simulator of the CUDA execution model, for compiling .cu files with a host compiler.
//
// There is one std::thread per CUDA thread of a block, which takes the blocks one by one.
// __syncthreads is a barrier of the block and __syncwarp one of the warp, so that a data race of
// the kernel is a data race of the program, which ThreadSanitizer reports, and an access out of
// bounds one that AddressSanitizer reports. What orders nothing on a GPU orders nothing here:
// shuffles and products of tiles, whose threads meet at a barrier that ThreadSanitizer does not
// see, and blocks.
//
// Shared memory begins as NaN, in every type. So does what an asynchronous copy will write, from
// the request on; the bytes come when they are waited for, as late as they may.
//
// ACCELRT_SIM_WITHOUT=file.cuh:line leaves out the barrier, or the wait for copies, of that place:
// tests use it to show that each of them is missed.
#pragma once

#include <array>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(int64_t x_ = 1, int64_t y_ = 1, int64_t z_ = 1)
      : x(static_cast<unsigned>(x_)), y(static_cast<unsigned>(y_)), z(static_cast<unsigned>(z_)) {}
};

inline thread_local dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim{1, 1, 1}, gridDim{1, 1, 1};

#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace host_sim {

constexpr int kWarp = 32;
using Place = std::source_location;

// What ThreadSanitizer is not to see while this lives: it orders nothing and is no race.
struct Unseen {
#if defined(__SANITIZE_THREAD__)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

struct LeftOut {
  std::string file;
  unsigned line = 0;  // none
  LeftOut() {
    const char* const text = std::getenv("ACCELRT_SIM_WITHOUT");
    if (text == nullptr) return;
    const std::string_view whole(text);
    const size_t colon = whole.rfind(':');
    file = whole.substr(0, colon);
    line = static_cast<unsigned>(std::strtoul(text + colon + 1, nullptr, 10));
  }
  bool is(const Place& place) const {
    return line != 0 && place.line() == line && std::string_view(place.file_name()).ends_with(file);
  }
};

inline const LeftOut left_out;

constexpr int kNaN = 0xff;  // every byte of one

struct Warp {
  explicit Warp(int threads) : size(threads), barrier(threads) {}
  int size;
  std::barrier<> barrier;
  uint64_t exchange[kWarp] = {};
  alignas(16) unsigned char gathered[kWarp][32] = {};
};

struct Block {
  explicit Block(int threads, int64_t shared_bytes) : barrier(threads) {
    for (int first = 0; first < threads; first += kWarp) {
      warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
    }
    // Exact size, so that AddressSanitizer sees an access past the end.
    if (shared_bytes > 0) {
      const size_t bytes = (shared_bytes + 15) / 16 * 16;
      shared = static_cast<unsigned char*>(std::aligned_alloc(16, bytes));
      std::memset(shared, kNaN, bytes);
    }
  }
  ~Block() { std::free(shared); }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  unsigned char* shared = nullptr;
};

inline thread_local Block* current = nullptr;

inline unsigned char* shared_memory() { return current->shared; }

inline Warp& warp() { return *current->warps[threadIdx.x / kWarp]; }

// All lanes of the warp take part (the masks of our kernels are full).
template <typename T, typename Source>
T exchange(T value, Source source) {
  static_assert(sizeof(T) <= 8);
  const Unseen unseen;
  Warp& w = warp();
  const int lane = threadIdx.x % kWarp;
  std::memcpy(&w.exchange[lane], &value, sizeof(T));
  w.barrier.arrive_and_wait();
  const int from = source(lane);
  T result = value;
  if (from >= 0 && from < w.size) std::memcpy(&result, &w.exchange[from], sizeof(T));
  w.barrier.arrive_and_wait();
  return result;
}

// What every lane of the warp holds.
template <typename T>
std::array<T, kWarp> gather(const T& value) {
  static_assert(sizeof(T) <= sizeof(Warp::gathered[0]));
  const Unseen unseen;
  Warp& w = warp();
  std::memcpy(w.gathered[threadIdx.x % kWarp], &value, sizeof(T));
  w.barrier.arrive_and_wait();
  std::array<T, kWarp> all{};
  for (int lane = 0; lane < w.size; ++lane) std::memcpy(&all[lane], w.gathered[lane], sizeof(T));
  w.barrier.arrive_and_wait();
  return all;
}

// A thread's asynchronous copies to shared memory: made when they are waited for.
struct Copies {
  static constexpr size_t kBytes = 16;
  struct Copy {
    void* to;
    const void* from;
    bool valid;
  };
  std::vector<Copy> current;
  std::deque<std::vector<Copy>> groups;

  void request(const Copy& copy) {
    const bool aligned = reinterpret_cast<uintptr_t>(copy.to) % kBytes == 0 &&
                         reinterpret_cast<uintptr_t>(copy.from) % kBytes == 0;
    if (!aligned) {
      std::fprintf(stderr, "an asynchronous copy is not aligned to 16 bytes\n");
      std::abort();
    }
    std::memset(copy.to, kNaN, kBytes);
    current.push_back(copy);
  }
  void commit() {
    groups.push_back(std::move(current));
    current.clear();
  }
  void wait(size_t pending) {
    for (; groups.size() > pending; groups.pop_front()) {
      for (const Copy& copy : groups.front()) make(copy);
    }
  }
  static void make(const Copy& copy) {
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, kBytes);
    } else {
      std::memset(copy.to, 0, kBytes);
    }
  }
};

inline Copies& copies() {
  thread_local Copies mine;
  return mine;
}

// Of every kernel that some launcher asks for: a hook for what runs kernels by name.
template <auto kKernel, typename Params>
void name_kernel();

#if !defined(ACCELRT_SIM_BY_NAME)
template <auto kKernel, typename Params>
void name_kernel() {}
#endif

// No template: what it needs of the library would be compiled for every instance of a kernel.
inline void run(dim3 grid, int threads, int64_t shared_bytes, const std::function<void()>& body) {
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  // All of them at first: whoever made one later would order its threads with those of others.
  std::deque<Block> made;
  for (int64_t b = 0; b < blocks; ++b) made.emplace_back(threads, shared_bytes);
  auto work = [&](int thread) {
    for (int64_t b = 0; b < blocks; ++b) {
      current = &made[b];
      threadIdx = dim3(thread, 0, 0);
      blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
      blockDim = dim3(threads);
      gridDim = grid;
      body();
      if (!copies().current.empty() || !copies().groups.empty()) {
        std::fprintf(stderr, "a thread ends with copies that nobody waited for\n");
        std::abort();
      }
    }
  };
  std::vector<std::thread> pool;
  pool.reserve(threads);
  for (int t = 0; t < threads; ++t) pool.emplace_back(work, t);
  for (std::thread& t : pool) t.join();
}

}  // namespace host_sim

inline void __syncthreads(host_sim::Place place = host_sim::Place::current()) {
  if (!host_sim::left_out.is(place)) host_sim::current->barrier.arrive_and_wait();
}

inline void __syncwarp(unsigned = 0xffffffffu, host_sim::Place place = host_sim::Place::current()) {
  if (!host_sim::left_out.is(place)) host_sim::warp().barrier.arrive_and_wait();
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_sim::exchange(value, [=](int lane) { return lane ^ mask; });
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  return host_sim::exchange(value, [=](int lane) { return lane + delta; });
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return host_sim::exchange(value, [=](int) { return source; });
}

inline float atomicAdd(float* address, float value) {
  return std::atomic_ref<float>(*address).fetch_add(value);
}

inline int atomicAdd(int* address, int value) {
  return std::atomic_ref<int>(*address).fetch_add(value);
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  std::atomic_ref<unsigned> ref(*address);
  unsigned old = ref.load();
  while (!ref.compare_exchange_weak(old, old >= limit ? 0 : old + 1)) {}
  return old;
}

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

template <typename T>
T __ldg(const T* p) {
  return *p;
}

#if defined(ACCELRT_SIM_BY_NAME)
#include "by_name.h"
#endif
