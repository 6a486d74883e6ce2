// Element types. Storage-only 16-bit floats with conversions for host and device. The device's
// are instructions, not those of cuda_fp16.h, which a machine without the toolkit does not have.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ACCELRT_HOST_DEVICE __host__ __device__
#else
#define ACCELRT_HOST_DEVICE
#endif

namespace accelrt {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
  }
  return "unknown";
}

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

namespace detail {

ACCELRT_HOST_DEVICE inline uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
#endif
}

ACCELRT_HOST_DEVICE inline float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, 4);
  return x;
#endif
}

// Portable binary16 conversions, round to nearest even; subnormals are kept.
inline float half_bits_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0x1f) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float subnormal = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return bits_float(sign | float_bits(subnormal));
}

inline uint16_t float_to_half_bits(float x) {
  const uint32_t u = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return sign | 0x7e00u;
  if (a >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (a < 0x38800000u) {                        // below 2^-14: subnormal result
    // Adding 0.5 aligns the mantissa so that the hardware rounds at 2^-24.
    const float shifted = bits_float(a) + 0.5f;
    return sign | static_cast<uint16_t>(float_bits(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

}  // namespace detail

ACCELRT_HOST_DEVICE inline float to_float(float x) { return x; }

ACCELRT_HOST_DEVICE inline float to_float(bfloat16 x) {
  return detail::bits_float(static_cast<uint32_t>(x.bits) << 16);
}

ACCELRT_HOST_DEVICE inline float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return detail::half_bits_to_float(x.bits);
#endif
}

template <typename T>
ACCELRT_HOST_DEVICE inline T from_float(float x);

template <>
ACCELRT_HOST_DEVICE inline float from_float<float>(float x) {
  return x;
}

template <>
ACCELRT_HOST_DEVICE inline bfloat16 from_float<bfloat16>(float x) {
  const uint32_t u = detail::float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <>
ACCELRT_HOST_DEVICE inline float16 from_float<float16>(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
#else
  return {detail::float_to_half_bits(x)};
#endif
}

}  // namespace accelrt
