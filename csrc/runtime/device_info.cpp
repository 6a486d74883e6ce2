#include "runtime/device_info.h"

#include <array>
#include <atomic>
#include <cstdlib>

#include "accelrt/check.h"

#if defined(ACCELRT_RUNTIME_CUDA)
#include "accelrt/kernel_launcher.h"
#elif defined(ACCELRT_HAVE_CUDA) && !defined(ACCELRT_HOST_SIM)
#include <cuda_runtime_api.h>
#endif

namespace accelrt {

#if defined(ACCELRT_HOST_SIM)

// Few enough that small tests have several waves of blocks.
DeviceInfo current_device_info() {
  const char* asked = std::getenv("ACCELRT_SIM_MULTIPROCESSORS");
  return {asked == nullptr ? 2 : std::atoi(asked), 64 * 1024};
}

#elif defined(ACCELRT_RUNTIME_CUDA)

// Asked at every call, and kept by what answers: only that knows the current device.
DeviceInfo current_device_info() {
  return {device_attribute(kMultiprocessors), device_attribute(kL2Bytes)};
}

#elif defined(ACCELRT_HAVE_CUDA)

namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, which, device);
  ACCELRT_CHECK(status == cudaSuccess, "device ", device, ": ", cudaGetErrorString(status));
  return value;
}

DeviceInfo asked(int device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrL2CacheSize, device)};
}

}  // namespace

DeviceInfo current_device_info() {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  ACCELRT_CHECK(status == cudaSuccess, "no current CUDA device: ", cudaGetErrorString(status));
  constexpr int kKept = 64;
  if (device >= kKept) return asked(device);
  // Threads that race here store the same values; the count, stored last, says that both are there.
  static std::array<std::atomic<int>, kKept> multiprocessors{};
  static std::array<std::atomic<int64_t>, kKept> l2_bytes{};
  const int known = multiprocessors[device].load(std::memory_order_acquire);
  if (known > 0) return {known, l2_bytes[device].load(std::memory_order_relaxed)};
  const DeviceInfo info = asked(device);
  l2_bytes[device].store(info.l2_bytes, std::memory_order_relaxed);
  multiprocessors[device].store(info.multiprocessors, std::memory_order_release);
  return info;
}

#else

DeviceInfo current_device_info() { ACCELRT_CHECK(false, "this build has no CUDA kernels"); }

#endif

}  // namespace accelrt
