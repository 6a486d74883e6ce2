// Memory for one call that starts a cache line, as that of operator new need not: a vector that
// straddles two lines costs two accesses.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace accelrt {

constexpr std::align_val_t kLine{64};
constexpr int64_t kLineFloats = 16;

struct FreeAligned {
  void operator()(float* p) const { ::operator delete(p, kLine); }
};

using AlignedFloats = std::unique_ptr<float[], FreeAligned>;

// Their values are left open.
inline AlignedFloats make_aligned(int64_t floats) {
  const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
  return AlignedFloats(static_cast<float*>(::operator new(bytes, kLine)));
}

// `floats` in whole lines.
constexpr int64_t whole_lines(int64_t floats) {
  return (floats + kLineFloats - 1) / kLineFloats * kLineFloats;
}

}  // namespace accelrt
