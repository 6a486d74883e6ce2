// One call that sends filled Params to the kernel of the tensor's device.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/tensor_view.h"

#if defined(ACCELRT_HAVE_CUDA)
#define ACCELRT_CALL_CUDA(launcher, params, stream) launcher(params, stream)
#else
#define ACCELRT_CALL_CUDA(launcher, params, stream) \
  (void)(stream);                                   \
  ACCELRT_CHECK(false, #launcher ": this build has no CUDA kernels")
#endif

// cpu: the function declared with ACCELRT_DECLARE_CPU; launcher: the CUDA one.
#define ACCELRT_RUN(device_, cpu, launcher, params, stream) \
  do {                                                      \
    if ((device_) == ::accelrt::Device::kCUDA) {            \
      ACCELRT_CALL_CUDA(launcher, params, stream);          \
    } else {                                                \
      ACCELRT_CALL_CPU(cpu, params);                        \
    }                                                       \
  } while (0)

// For an operator that was declared with ACCELRT_DECLARE_CPU_BF16 too.
#define ACCELRT_RUN_BF16(device_, cpu, launcher, params, stream) \
  do {                                                           \
    if ((device_) == ::accelrt::Device::kCUDA) {                 \
      ACCELRT_CALL_CUDA(launcher, params, stream);               \
    } else {                                                     \
      ACCELRT_CALL_CPU_BF16(cpu, params);                        \
    }                                                            \
  } while (0)
