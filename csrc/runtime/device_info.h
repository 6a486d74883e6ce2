// Sizes of the CUDA device by which launchers choose their tiles and callers their slices.
#pragma once

#include <cstdint>

namespace accelrt {

struct DeviceInfo {
  int multiprocessors = 1;
  int64_t l2_bytes = 0;
};

// Of the calling thread's current device; asked once per device. Throws in a build without CUDA.
DeviceInfo current_device_info();

}  // namespace accelrt
