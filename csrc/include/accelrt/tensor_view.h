// A tensor as the kernels see it: a pointer, sizes, strides (in elements), a device.
#pragma once

#include <cstdint>
#include <optional>

#include "accelrt/check.h"
#include "accelrt/types.h"

namespace accelrt {

constexpr int kMaxDims = 6;

enum class Device : int { kCPU = 0, kCUDA = 1 };

// The CUDA stream to launch on (a cudaStream_t); ignored on the CPU.
using Stream = void*;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device = Device::kCPU;
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= size[i];
    return n;
  }

  template <typename T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

using OptionalView = std::optional<TensorView>;

// The pointer of an optional tensor, null if absent.
inline const void* data_or_null(const OptionalView& t) { return t ? t->data : nullptr; }

inline void check_same_type(const char* op, const char* name, const TensorView& t,
                            const TensorView& like) {
  ACCELRT_CHECK(t.dtype == like.dtype, op, ": ", name, " is ", name_of(t.dtype), ", expected ",
                name_of(like.dtype));
  ACCELRT_CHECK(t.device == like.device, op, ": ", name, " is on another device");
}

inline void check_same_shape(const char* op, const char* name, const TensorView& t,
                             const TensorView& like) {
  ACCELRT_CHECK(t.ndim == like.ndim, op, ": ", name, " has ", t.ndim, " dimensions, expected ",
                like.ndim);
  for (int i = 0; i < t.ndim; ++i) {
    ACCELRT_CHECK(t.size[i] == like.size[i], op, ": ", name, " has size ", t.size[i],
                  " in dimension ", i, ", expected ", like.size[i]);
  }
}

// A float32 tensor of statistics or weights on the device of `like`.
inline void check_float32(const char* op, const char* name, const TensorView& t,
                          const TensorView& like) {
  ACCELRT_CHECK(t.dtype == DType::kFloat32, op, ": ", name, " is ", name_of(t.dtype),
                ", expected float32");
  ACCELRT_CHECK(t.device == like.device, op, ": ", name, " is on another device");
}

// The last stride is one (or irrelevant).
inline void check_unit_stride(const char* op, const char* name, const TensorView& t) {
  const int last = t.ndim - 1;
  ACCELRT_CHECK(t.size[last] <= 1 || t.stride[last] == 1, op, ": the last stride of ", name, " is ",
                t.stride[last], ", expected 1");
}

}  // namespace accelrt
