// What the device code of all kernels shares. A .cu file that includes this compiles with
// nvcc, and with a host compiler in two ways:
// - under the simulator (ACCELRT_HOST_SIM, tests/cpp/host_sim.h), which supplies threadIdx and
//   friends, barriers and shuffles and runs the kernels;
// - for kernels that are compiled at run time (ACCELRT_RUNTIME_CUDA): the launchers alone, which
//   name their kernels (kernel_launcher.h).
// In the last case NVRTC compiles the .cuh files (__CUDACC_RTC__), with csrc/nvrtc for the
// headers of the standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "accelrt/check.h"
#include "accelrt/tensor_view.h"
#include "accelrt/types.h"

#if defined(ACCELRT_HOST_SIM)
#include "host_sim.h"
#elif defined(ACCELRT_RUNTIME_CUDA)
#include "accelrt/device_stubs.h"
#include "accelrt/kernel_launcher.h"
#include "accelrt/kernel_name.h"
#elif !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#endif

namespace accelrt {

constexpr int kWarpSize = 32;

struct LaunchConfig {
  int64_t grid_x = 1;
  int64_t grid_y = 1;
  int64_t grid_z = 1;
  int threads = 256;
  int64_t shared_bytes = 0;
};

inline void check_config(const char* op, const LaunchConfig& config) {
  ACCELRT_CHECK(config.grid_x >= 1 && config.grid_y >= 1 && config.grid_z >= 1, op, ": a grid of ",
                config.grid_x, " x ", config.grid_y, " x ", config.grid_z, " blocks");
  ACCELRT_CHECK(config.grid_x <= 2147483647, op, ": grid.x ", config.grid_x, " is too large");
  ACCELRT_CHECK(config.grid_y <= 65535, op, ": grid.y ", config.grid_y, " exceeds 65535");
  ACCELRT_CHECK(config.grid_z <= 65535, op, ": grid.z ", config.grid_z, " exceeds 65535");
}

// launch<kernel>(op, config, stream, params): runs `kernel(params)`. The kernel is a template
// argument, so that its full name is known where it is compiled at run time; it is in namespace
// accelrt and takes a Params that can be copied as bytes.
#if defined(ACCELRT_HOST_SIM)

template <auto kKernel, typename Params>
void launch(const char* op, const LaunchConfig& config, Stream, const Params& params) {
  check_config(op, config);
  host_sim::name_kernel<kKernel, Params>();
  host_sim::run(dim3(config.grid_x, config.grid_y, config.grid_z), config.threads,
                config.shared_bytes, [&] { kKernel(params); });
}

inline unsigned char* shared_memory() { return host_sim::shared_memory(); }

#elif defined(ACCELRT_RUNTIME_CUDA)

namespace detail {

template <auto kKernel, size_t kParamsBytes>
struct ListedKernel {
  static inline const bool done =
      list_kernel({ACCELRT_KERNEL_FOLDER, kernel_name<kKernel>(), kParamsBytes});
};

}  // namespace detail

template <auto kKernel, typename Params>
void launch(const char* op, const LaunchConfig& config, Stream stream, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>);
  check_config(op, config);
  static_cast<void>(detail::ListedKernel<kKernel, sizeof(Params)>::done);
  launch_kernel({op,
                 ACCELRT_KERNEL_FOLDER,
                 kernel_name<kKernel>(),
                 {config.grid_x, config.grid_y, config.grid_z},
                 config.threads,
                 config.shared_bytes,
                 stream,
                 &params,
                 sizeof(Params)});
}

inline unsigned char* shared_memory() { return detail::never_called<unsigned char*>(); }

#elif defined(__CUDACC__)

#if !defined(__CUDACC_RTC__)
template <auto kKernel, typename Params>
void launch(const char* op, const LaunchConfig& config, Stream stream, const Params& params) {
  check_config(op, config);
  constexpr int64_t kDefaultShared = 48 * 1024;
  if (config.shared_bytes > kDefaultShared) {
    const cudaError_t status =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(config.shared_bytes));
    ACCELRT_CHECK(status == cudaSuccess, op, ": ", config.shared_bytes,
                  " bytes of shared memory: ", cudaGetErrorString(status));
  }
  const dim3 grid(static_cast<unsigned>(config.grid_x), static_cast<unsigned>(config.grid_y),
                  static_cast<unsigned>(config.grid_z));
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t status = cudaLaunchKernel(
      reinterpret_cast<const void*>(kKernel), grid, dim3(static_cast<unsigned>(config.threads)),
      arguments, static_cast<size_t>(config.shared_bytes), static_cast<cudaStream_t>(stream));
  ACCELRT_CHECK(status == cudaSuccess, op, ": launch failed: ", cudaGetErrorString(status));
}
#endif

// The dynamic shared memory of the block, 16-byte aligned.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char accelrt_shared[];
  return accelrt_shared;
}

#endif

// N elements moved as one access of up to 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <int N, typename T>
__device__ __forceinline__ void load_pack(const T* p, float (&x)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(pack.value[i]);
}

template <int N, typename T>
__device__ __forceinline__ void store_pack(T* p, const float (&x)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.value[i] = from_float<T>(x[i]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, lane);
  }
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  }
  return x;
}

// The sum over the block, in every thread. `scratch` holds one float per warp; its contents
// may be reused after the next barrier only.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warps = (blockDim.x + kWarpSize - 1) / kWarpSize;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  float total = 0.f;
  for (int w = 0; w < warps; ++w) total += scratch[w];
  __syncthreads();
  return total;
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

__device__ __forceinline__ float gelu(float x) {
  return 0.5f * x * erfcf(-x * 0.70710678118654752f);
}

__device__ __forceinline__ float gelu_tanh(float x) {
  const float u = 0.7978845608028654f * x * (1.f + 0.044715f * x * x);
  return x / (1.f + expf(-2.f * u));
}

}  // namespace accelrt
