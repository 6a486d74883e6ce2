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
  const char* folder;  // one of its .cuh files defines the kernel: "kernels/<op>"
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

// An attribute of the calling thread's current device, by its number in CUDA's API
// (cudaDeviceAttr, which is CUdevice_attribute).
using DeviceAttribute = int (*)(int attribute);

// Null: none, as at the start. Not meant to race with launches.
void set_kernel_launcher(KernelLauncher launcher, DeviceAttribute attribute);

// Hands a launch to the registered launcher. Throws if there is none.
void launch_kernel(const KernelLaunch& launch);

// For launchers whose choices depend on the device; as above.
int device_attribute(int attribute);
constexpr int kMultiprocessors = 16;
constexpr int kL2Bytes = 38;

// A kernel that some launcher of this program may ask for.
struct KernelName {
  const char* folder;
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
