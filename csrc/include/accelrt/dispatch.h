// From a run-time dtype to a compile-time element type.
#pragma once

#include <type_traits>

#include "accelrt/check.h"
#include "accelrt/types.h"

namespace accelrt {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls fn(TypeTag<T>{}) for the element type of `dtype`.
template <typename Fn>
void dispatch_dtype(const char* op, DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32: fn(TypeTag<float>{}); return;
    case DType::kBFloat16: fn(TypeTag<bfloat16>{}); return;
    case DType::kFloat16: fn(TypeTag<float16>{}); return;
  }
  ACCELRT_CHECK(false, op, ": unsupported dtype ", static_cast<int>(dtype));
}

// Calls fn(std::true_type) or fn(std::false_type).
template <typename Fn>
void dispatch_bool(bool value, Fn&& fn) {
  if (value) {
    fn(std::true_type{});
  } else {
    fn(std::false_type{});
  }
}

}  // namespace accelrt
