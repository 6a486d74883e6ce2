// The built-ins of device code, for the host compiler of a build without nvcc. It compiles the
// launchers, and with them names the kernels; their bodies must parse but are never called, and
// none reaches the object file. Nothing here computes anything: for running kernels on the host
// there is the simulator (tests/cpp/host_sim.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace accelrt {
namespace detail {

template <typename T>
[[noreturn]] inline T never_called() {
  __builtin_trap();
}

struct StubIndex {
  unsigned x, y, z;
};

}  // namespace detail

inline detail::StubIndex threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { detail::never_called<void>(); }
inline void __syncwarp(unsigned = 0) { detail::never_called<void>(); }
inline void __threadfence() { detail::never_called<void>(); }

template <typename T>
T __shfl_sync(unsigned, T, int) {
  return detail::never_called<T>();
}
template <typename T>
T __shfl_up_sync(unsigned, T, int) {
  return detail::never_called<T>();
}
template <typename T>
T __shfl_down_sync(unsigned, T, int) {
  return detail::never_called<T>();
}
template <typename T>
T __shfl_xor_sync(unsigned, T, int) {
  return detail::never_called<T>();
}

template <typename T>
T atomicAdd(T*, T) {
  return detail::never_called<T>();
}
inline unsigned atomicInc(unsigned*, unsigned) { return detail::never_called<unsigned>(); }

template <typename T>
T __ldg(const T*) {
  return detail::never_called<T>();
}

inline float rsqrtf(float) { return detail::never_called<float>(); }
inline float __expf(float) { return detail::never_called<float>(); }
inline float __fdividef(float, float) { return detail::never_called<float>(); }

}  // namespace accelrt
