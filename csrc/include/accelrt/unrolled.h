// Loops over arrays that must stay in registers.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "accelrt/vec.h"

namespace accelrt {
namespace ACCELRT_ISA {

// Calls fn with every index as a constant: g++ keeps an array in registers only if its loops are
// gone before it looks.
template <typename Fn, size_t... kIndices>
inline void unrolled(std::index_sequence<kIndices...>, const Fn& fn) {
  (fn(std::integral_constant<int, kIndices>{}), ...);
}

template <int kCount, typename Fn>
inline void unrolled(const Fn& fn) {
  unrolled(std::make_index_sequence<kCount>{}, fn);
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
