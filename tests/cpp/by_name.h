// Under the simulator: every kernel that some launcher asks for, found by its name. This is what a
// GPU does with a kernel that was compiled at run time: it sees a name, a grid and bytes.
#pragma once

#include <map>
#include <string>

#include "accelrt/kernel_name.h"

namespace host_sim {

struct NamedKernel {
  size_t params_bytes = 0;
  void (*run)(dim3 grid, int threads, int64_t shared_bytes, const void* params) = nullptr;
};

inline std::map<std::string, NamedKernel>& named_kernels() {
  static std::map<std::string, NamedKernel> map;
  return map;
}

template <auto kKernel, typename Params>
void run_bytes(dim3 grid, int threads, int64_t shared_bytes, const void* params) {
  run(grid, threads, shared_bytes, [&] { kKernel(*static_cast<const Params*>(params)); });
}

template <auto kKernel, typename Params>
struct Named {
  static inline const bool done =
      named_kernels()
          .insert({accelrt::kernel_name<kKernel>(), {sizeof(Params), &run_bytes<kKernel, Params>}})
          .second;
};

template <auto kKernel, typename Params>
void name_kernel() {
  static_cast<void>(Named<kKernel, Params>::done);
}

}  // namespace host_sim

// 0, or 1 if there is no kernel of that name, or 2 if its parameters are of another size. The
// library's only symbol: it holds the same templates as the program that uses it, compiled
// otherwise.
extern "C" __attribute__((visibility("default"))) int accelrt_run_by_name(
    const char* kernel, const int64_t* grid, int threads, int64_t shared_bytes, const void* params,
    size_t params_bytes);
