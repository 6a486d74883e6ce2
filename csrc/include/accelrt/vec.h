// The SIMD vector of the instruction set that a file is compiled for.
//
// Vec holds kLanes floats (16 on AVX-512, 8 otherwise) in a compiler vector, so that one
// source serves all instruction sets; only the 16-bit conversions use intrinsics. Every
// name lives in namespace accelrt::ACCELRT_ISA, so the variants never mix at link time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "accelrt/types.h"

#ifndef ACCELRT_ISA
#define ACCELRT_ISA generic
#endif

namespace accelrt {
namespace ACCELRT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float VFloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t VInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VUInt __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VHalfBits __attribute__((vector_size(kLanes * 2)));

struct Vec {
  VFloat v;

  Vec() = default;
  Vec(VFloat x) : v(x) {}
  Vec(float x) : v(VFloat{} + x) {}

  friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  Vec& operator+=(Vec b) {
    v += b.v;
    return *this;
  }
  Vec& operator*=(Vec b) {
    v *= b.v;
    return *this;
  }
};

// a * b + c; contracted to one instruction where the instruction set has it.
inline Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
inline Vec min(Vec a, Vec b) { return a.v < b.v ? a.v : b.v; }
inline Vec max(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
inline Vec abs(Vec a) {
  return reinterpret_cast<VFloat>(reinterpret_cast<VUInt>(a.v) & 0x7fffffffu);
}
inline Vec select(VInt mask, Vec a, Vec b) { return mask ? a.v : b.v; }

inline float sum(Vec a) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += a.v[i];
  return s;
}

inline float max_of(Vec a) {
  float m = a.v[0];
  for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

// Loads and stores: kLanes elements at p, unaligned.
inline Vec load(const float* p) {
  Vec r;
  std::memcpy(&r.v, p, sizeof(r.v));
  return r;
}

inline Vec load(const bfloat16* p) {
  VHalfBits h;
  std::memcpy(&h, p, sizeof(h));
  return reinterpret_cast<VFloat>(__builtin_convertvector(h, VUInt) << 16);
}

inline Vec load(const float16* p) {
#if defined(__AVX512F__)
  return (VFloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (VFloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = to_float(p[i]);
  return r;
#endif
}

inline void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof(a.v)); }

inline void store(bfloat16* p, Vec a) {
  const VUInt u = reinterpret_cast<VUInt>(a.v);
  const VUInt rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VUInt nan = (u >> 16) | 0x40u;
  const VUInt bits = (u & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)bits));
#else
  const VHalfBits h = __builtin_convertvector(bits, VHalfBits);
  std::memcpy(p, &h, sizeof(h));
#endif
}

inline void store(float16* p, Vec a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)a.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)a.v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<float16>(a.v[i]);
#endif
}

// The first n < kLanes elements; the other lanes read as `fill` and are not written.
template <typename T>
inline Vec load_n(const T* p, int n, float fill = 0.f) {
  Vec r(fill);
  for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
  return r;
}

template <typename T>
inline void store_n(T* p, int n, Vec a) {
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(a.v[i]);
}

// Applies fn(index, lanes) over [0, n): full vectors first, then the tail.
template <typename Fn>
inline void for_lanes(int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) fn(i, kLanes);
  if (i < n) fn(i, static_cast<int>(n - i));
}

template <typename T>
inline Vec load_any(const T* p, int n, float fill = 0.f) {
  return n == kLanes ? load(p) : load_n(p, n, fill);
}

template <typename T>
inline void store_any(T* p, int n, Vec a) {
  if (n == kLanes) {
    store(p, a);
  } else {
    store_n(p, n, a);
  }
}

// e^x. Cody-Waite reduction and a degree-6 polynomial: relative error below 2e-7 on
// [-87, 88]; smaller arguments give 0, larger ones infinity.
inline Vec exp(Vec x) {
  const Vec clamped = min(max(x, Vec(-87.33654f)), Vec(88.72283f));
  const VFloat magic = VFloat{} + 12582912.f;  // 1.5 * 2^23: rounds to the nearest integer
  VFloat t = clamped.v * 1.44269504088896341f + magic;
  // The compiler must not fold (y + magic) - magic; without fast-math it does not.
  const VFloat n = t - magic;
  const VInt k = reinterpret_cast<VInt>(t) - reinterpret_cast<VInt>(magic);
  VFloat r = clamped.v - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VFloat p = VFloat{} + 1.3888889e-3f;
  p = p * r + 8.3333337e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  // Two factors, so that 2^128 (just below overflow) does not need an exponent of 255.
  const VInt half = k >> 1;
  const VFloat s1 = reinterpret_cast<VFloat>((half + 127) << 23);
  const VFloat s2 = reinterpret_cast<VFloat>((k - half + 127) << 23);
  VFloat result = p * s1 * s2;
  result = x.v < -87.33654f ? VFloat{} : result;
  result = x.v > 88.72283f ? VFloat{} + INFINITY : result;
  return x.v != x.v ? x.v : result;
}

// 1 / (1 + e^-x).
inline Vec sigmoid(Vec x) { return Vec(1.f) / (Vec(1.f) + exp(Vec(0.f) - x)); }

inline Vec silu(Vec x) { return x / (Vec(1.f) + exp(Vec(0.f) - x)); }

// tanh: 1 - 2 / (e^2x + 1), and the odd Taylor polynomial below 0.25, where the former
// cancels.
inline Vec tanh(Vec x) {
  const Vec a = abs(x);
  const VFloat x2 = x.v * x.v;
  VFloat p = VFloat{} + 2.1869488e-2f;  // 62/2835
  p = p * x2 - 5.3968254e-2f;           // 17/315
  p = p * x2 + 1.3333333e-1f;
  p = p * x2 - 3.3333334e-1f;
  const VFloat small = x.v + x.v * x2 * p;
  const Vec e = exp(Vec(2.f) * a);
  const Vec large = Vec(1.f) - Vec(2.f) / (e + Vec(1.f));
  const VFloat signed_large = x.v < 0.f ? -large.v : large.v;
  return a.v < 0.25f ? small : signed_large;
}

// erf: Abramowitz and Stegun 7.1.26's form is only good to 1.5e-7 absolute, which loses the
// relative accuracy that gelu needs on its left tail, so gelu uses erfc below instead.
// erfc(a) for a >= 0: t = 1 / (1 + a / 2), t exp(-a^2 + P(t)); relative error below 1.2e-7
// (Numerical Recipes' Chebyshev fit, W. H. Press et al., section 6.2).
inline Vec erfc_positive(Vec a) {
  const VFloat t = 1.f / (1.f + 0.5f * a.v);
  VFloat p = VFloat{} + 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  return Vec(t) * exp(Vec(p - a.v * a.v));
}

// x Phi(x), erf form. Phi(x) = erfc(-x / sqrt 2) / 2; the left tail keeps relative accuracy.
inline Vec gelu(Vec x) {
  const Vec a = abs(x) * Vec(0.70710678118654752f);
  const Vec tail = Vec(0.5f) * erfc_positive(a);
  const VFloat phi = x.v < 0.f ? tail.v : 1.f - tail.v;
  return x.v * phi;
}

// The tanh form of gelu, written as x sigmoid(2 u) so that the left tail does not cancel.
inline Vec gelu_tanh(Vec x) {
  const VFloat u = 0.7978845608028654f * x.v * (1.f + 0.044715f * x.v * x.v);
  return x / (Vec(1.f) + exp(Vec(-2.f * u)));
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
