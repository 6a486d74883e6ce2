// The part of the DLPack ABI that hands memory to torch: the unversioned managed tensor.
// Layouts follow https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <cstdint>

namespace accelrt::dlpack {

enum DeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2 };

struct Device {
  int32_t type;  // a DeviceType
  int32_t id;
};

enum TypeCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

struct DataType {
  uint8_t code;  // a TypeCode
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(ManagedTensor* self);
};

static_assert(sizeof(void*) != 8 || sizeof(ManagedTensor) == 64, "the DLPack ABI");

// The capsule's name before a consumer has taken the tensor.
inline constexpr const char* kCapsuleName = "dltensor";

}  // namespace accelrt::dlpack
