// Launches of a build without nvcc: the launchers are the same, but a function of the program's
// choice compiles the named kernel from its source at first use and runs it. The Python package
// registers one on CuPy; a C++ program may register its own, on NVRTC and the driver's API.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "accelrt/tensor_view.h"

namespace accelrt {

struct KernelLaunch {
  const char* op;      // for messages
  const char* source;  // the header that defines the kernel: "kernels/<op>/<op>.cuh"
  // The kernel as an expression of namespace accelrt, with its template arguments.
  const char* kernel;
  int64_t grid[3];
  int threads;           // of a block, along x
  int64_t shared_bytes;  // dynamic
  Stream stream;
  // The kernel's only argument; the launcher copies it before it returns.
  const void* params;
  size_t params_bytes;
};

// Throws an accelrt::Error if it cannot run the kernel.
using KernelLauncher = void (*)(const KernelLaunch& launch);

// Null: none, as at the start. Not meant to race with launches.
void set_kernel_launcher(KernelLauncher launcher);

// Hands a launch to the registered launcher. Throws if there is none.
void launch_kernel(const KernelLaunch& launch);

// A kernel that some launcher of this program may ask for.
struct KernelName {
  const char* source;
  const char* kernel;
  size_t params_bytes;
};

// All of them, in no particular order. Empty where nvcc compiled the kernels.
const std::vector<KernelName>& kernel_names();

namespace detail {

// For static initialisation; returns true.
bool list_kernel(const KernelName& name);

}  // namespace detail
}  // namespace accelrt
