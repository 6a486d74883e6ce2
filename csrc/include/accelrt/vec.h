// The SIMD vector of the instruction set that a file is compiled for.
//
// Vec holds kLanes floats (16 with AVX-512, 8 with AVX2, 4 otherwise: a register of each; g++
// takes vectors of more than one apart, some of them into scalars) in a compiler vector, so that
// one source serves all instruction sets; intrinsics appear only where the compiler does not find
// the instruction. Every name lives in namespace accelrt::ACCELRT_ISA, so the variants never mix at
// link time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "accelrt/types.h"

#ifndef ACCELRT_ISA
#define ACCELRT_ISA generic
#endif

namespace accelrt {
namespace ACCELRT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
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

// a * b + c and c - a * b; one rounding where the instruction set has it. With a NaN, min and max
// return b.
#if defined(__AVX512F__)
inline Vec fma(Vec a, Vec b, Vec c) {
  return (VFloat)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v);
}
inline Vec fnma(Vec a, Vec b, Vec c) {
  return (VFloat)_mm512_fnmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v);
}
inline Vec min(Vec a, Vec b) { return (VFloat)_mm512_min_ps((__m512)a.v, (__m512)b.v); }
inline Vec max(Vec a, Vec b) { return (VFloat)_mm512_max_ps((__m512)a.v, (__m512)b.v); }
#elif defined(__AVX2__)
inline Vec fma(Vec a, Vec b, Vec c) {
  return (VFloat)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v);
}
inline Vec fnma(Vec a, Vec b, Vec c) {
  return (VFloat)_mm256_fnmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v);
}
inline Vec min(Vec a, Vec b) { return (VFloat)_mm256_min_ps((__m256)a.v, (__m256)b.v); }
inline Vec max(Vec a, Vec b) { return (VFloat)_mm256_max_ps((__m256)a.v, (__m256)b.v); }
#elif defined(__SSE2__)
inline Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
inline Vec fnma(Vec a, Vec b, Vec c) { return c.v - a.v * b.v; }
inline Vec min(Vec a, Vec b) { return (VFloat)_mm_min_ps((__m128)a.v, (__m128)b.v); }
inline Vec max(Vec a, Vec b) { return (VFloat)_mm_max_ps((__m128)a.v, (__m128)b.v); }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
inline Vec fnma(Vec a, Vec b, Vec c) { return c.v - a.v * b.v; }
inline Vec min(Vec a, Vec b) { return a.v < b.v ? a.v : b.v; }
inline Vec max(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
#endif
inline Vec abs(Vec a) {
  return reinterpret_cast<VFloat>(reinterpret_cast<VUInt>(a.v) & 0x7fffffffu);
}
inline Vec select(VInt mask, Vec a, Vec b) { return mask ? a.v : b.v; }

inline float sum(Vec a) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 low = (__m256)__builtin_shufflevector(a.v, a.v, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 high = (__m256)__builtin_shufflevector(a.v, a.v, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m256 eight = _mm256_add_ps(low, high);
#else
  const __m256 eight = (__m256)a.v;
#endif
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += a.v[i];
  return s;
#endif
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
  // g++ 12 makes five instructions of the compiler vector's conversion.
#if defined(__AVX512F__)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (VFloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#elif defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (VFloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#elif defined(__SSE2__)
  const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (VFloat)_mm_unpacklo_epi16(_mm_setzero_si128(), h);
#else
  VHalfBits h;
  std::memcpy(&h, p, sizeof(h));
  return reinterpret_cast<VFloat>(__builtin_convertvector(h, VUInt) << 16);
#endif
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

// The bits of the nearest bfloat16 in the high half of each lane, anything in the low half. Where
// there are instructions for it (AVX512-BF16), stores use those, which flush subnormals to zero.
inline VUInt bfloat16_high_bits(Vec a) {
#if defined(__AVX512F__)
  const __m512i u = (__m512i)a.v;
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)a.v, (__m512)a.v, _CMP_UNORD_Q);
  const __m512i down = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  const __m512i even = _mm512_mask_add_epi32(down, odd, down, _mm512_set1_epi32(1));
  return (VUInt)_mm512_mask_or_epi32(even, nan, u, _mm512_set1_epi32(0x400000));
#else
  const VUInt u = reinterpret_cast<VUInt>(a.v);
  const VUInt rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return a.v != a.v ? u | 0x400000u : rounded;
#endif
}

inline VUInt bfloat16_bits(Vec a) { return bfloat16_high_bits(a) >> 16; }

inline void store(bfloat16* p, Vec a) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)a.v));
#elif defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16((__m512i)bfloat16_bits(a)));
#elif defined(__AVX2__)
  const __m256i bits = (__m256i)bfloat16_bits(a);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
#elif defined(__SSE2__)
  // Sign-extended halves: the signed saturation of the only narrowing move leaves them alone.
  const __m128i bits = _mm_srai_epi32((__m128i)bfloat16_high_bits(a), 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(bits, bits));
#else
  const VHalfBits h = __builtin_convertvector(bfloat16_bits(a), VHalfBits);
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

// 2 kLanes elements at p in two vectors, in an order of the element type's own: even and odd
// elements for bfloat16, which saves the widening and narrowing moves. For elementwise work,
// with all operands loaded and stored this way.
template <typename T>
inline void load_pair(const T* p, Vec& a, Vec& b) {
  a = load(p);
  b = load(p + kLanes);
}

inline void load_pair(const bfloat16* p, Vec& a, Vec& b) {
  VUInt u;
  std::memcpy(&u, p, sizeof(u));
  a = reinterpret_cast<VFloat>(u << 16);
  b = reinterpret_cast<VFloat>(u & 0xffff0000u);
}

template <typename T>
inline void store_pair(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + kLanes, b);
}

inline VUInt pair_bits(Vec a, Vec b) {
#if defined(__AVX512BF16__)
  // The conversion puts one vector after the other.
  const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order =
      _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(kLanes)), 16));
  return (VUInt)_mm512_permutexvar_epi16(order,
                                         (__m512i)_mm512_cvtne2ps_pbh((__m512)b.v, (__m512)a.v));
#elif defined(__AVX512F__)
  return (VUInt)_mm512_mask_mov_epi16((__m512i)bfloat16_bits(a), 0xaaaaaaaau,
                                      (__m512i)bfloat16_high_bits(b));
#else
  return bfloat16_bits(a) | (bfloat16_high_bits(b) & 0xffff0000u);
#endif
}

inline void store_pair(bfloat16* p, Vec a, Vec b) {
  const VUInt u = pair_bits(a, b);
  std::memcpy(p, &u, sizeof(u));
}

// A store past the caches; p is aligned to the vector.
inline void stream(void* p, VUInt a) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)a);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)a);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)a);
#else
  std::memcpy(p, &a, sizeof(a));
#endif
}

// store_pair, past the caches if asked (see streaming.h); p is then aligned to a cache line.
template <typename T>
inline void store_pair(T* p, Vec a, Vec b, bool past) {
  if (!past) return store_pair(p, a, b);
  if constexpr (sizeof(T) == 4) {
    stream(p, reinterpret_cast<VUInt>(a.v));
    stream(p + kLanes, reinterpret_cast<VUInt>(b.v));
  } else {
    alignas(64) T values[2 * kLanes];
    store_pair(values, a, b);
    VUInt u;
    std::memcpy(&u, values, sizeof(u));
    stream(p, u);
  }
}

template <>
inline void store_pair(bfloat16* p, Vec a, Vec b, bool past) {
  if (!past) return store_pair(p, a, b);
  stream(p, pair_bits(a, b));
}

// The first n < kLanes elements; the other lanes read as `fill` and are not written.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec load_n(const float* p, int n, float fill = 0.f) {
  return (VFloat)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p);
}

inline Vec load_n(const bfloat16* p, int n, float fill = 0.f) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  return (VFloat)_mm512_mask_mov_ps(_mm512_set1_ps(fill), first_lanes(n),
                                    (__m512)_mm512_slli_epi32(bits, 16));
}

inline Vec load_n(const float16* p, int n, float fill = 0.f) {
  return (VFloat)_mm512_mask_cvtph_ps(_mm512_set1_ps(fill), first_lanes(n),
                                      _mm256_maskz_loadu_epi16(first_lanes(n), p));
}

inline void store_n(float* p, int n, Vec a) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)a.v);
}

inline void store_n(bfloat16* p, int n, Vec a) {
#if defined(__AVX512BF16__)
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)a.v);
#else
  const __m256i bits = _mm512_cvtepi32_epi16((__m512i)bfloat16_bits(a));
#endif
  _mm256_mask_storeu_epi16(p, first_lanes(n), bits);
}

inline void store_n(float16* p, int n, Vec a) {
  _mm256_mask_storeu_epi16(p, first_lanes(n),
                           _mm512_cvtps_ph((__m512)a.v, _MM_FROUND_TO_NEAREST_INT));
}
#else
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
#endif

// Applies fn(index, lanes) over [0, n): full vectors first, then the tail.
template <typename Fn>
inline void for_lanes(int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) fn(i, kLanes);
  if (i < n) fn(i, static_cast<int>(n - i));
}

// Applies pair(index) to every 2 kLanes of [0, n), then single(index, lanes) to the rest.
template <typename Pair, typename Single>
inline void for_pairs(int64_t n, const Pair& pair, const Single& single) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) pair(i);
  for (; i + kLanes <= n; i += kLanes) single(i, kLanes);
  if (i < n) single(i, static_cast<int>(n - i));
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

// 1.5 * 2^23: adding it rounds to the nearest integer, which is then in the low bits.
constexpr float kRoundMagic = 12582912.f;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f;  // ten bits, so that its product with k is exact
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kExpMin = -87.33654f;  // -126 ln 2
constexpr float kExpMax = 88.72283f;   // just below 128 ln 2

// 2^k e^r for |r| <= ln(2) / 2, where t = k + kRoundMagic. The minimax polynomial has a relative
// error of 9e-8 and is exact at 0. k is added to the exponent of its value, which suffices
// between kExpMin and kExpMax, for at k = 128 the value does not exceed 1.
inline Vec exp_reduced(Vec t, Vec r) {
  Vec p = fma(r, Vec(8.290272e-3f), Vec(4.189818e-2f));
  p = fma(p, r, Vec(1.6667639e-1f));
  p = fma(p, r, Vec(4.9999148e-1f));
  p = fma(p, r, Vec(9.999997e-1f));
  p = fma(p, r, Vec(1.f));
  return reinterpret_cast<VFloat>(reinterpret_cast<VUInt>(p.v) +
                                  (reinterpret_cast<VUInt>(t.v) << 23));
}

// e^x for x clamped to [kExpMin, kExpMax]; a NaN gives any value.
inline Vec exp_clamped(Vec x) {
  const Vec c = min(Vec(kExpMax), max(Vec(kExpMin), x));
  const Vec t = fma(c, Vec(kLog2E), Vec(kRoundMagic));
  // The compiler must not fold (y + magic) - magic; without fast-math it does not.
  const Vec k = t - Vec(kRoundMagic);
  return exp_reduced(t, fma(k, Vec(-kLn2Low), fma(k, Vec(-kLn2High), c)));
}

// e^x. Relative error below 2e-7 on [-87, 88]; smaller arguments give 0, larger ones infinity.
inline Vec exp(Vec x) {
  VFloat result = exp_clamped(x).v;
  result = x.v < kExpMin ? VFloat{} : result;
  result = x.v > kExpMax ? VFloat{} + INFINITY : result;
  return x.v != x.v ? x.v : result;
}

// 1 + e^-x; the underflow of e^-x is of no consequence here.
inline Vec one_plus_exp_minus(Vec x) {
  const Vec e = exp_clamped(Vec(0.f) - x);
  return Vec(1.f) + select(x.v < -kExpMax, Vec(INFINITY), e);
}

// 1 / (1 + e^-x).
inline Vec sigmoid(Vec x) { return Vec(1.f) / one_plus_exp_minus(x); }

inline Vec silu(Vec x) { return x / one_plus_exp_minus(x); }

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

// x Phi(x), erf form, as max(x, 0) - |x| tail(|x|), whose left tail keeps relative accuracy.
// tail(a) = erfc(a / sqrt 2) / 2 = e^(-a^2 / 2) t Q(t) with t = 1 / (1 + 0.3025 a): Q is the
// minimax polynomial of degree 7, of relative error 9e-8. The exponent is reduced from the
// unrounded a^2, since a rounding of a^2 would be as large as the result's error in the tail.
// Beyond kEnd, where the result is below 4e-37, the tail is zero.
inline Vec gelu(Vec x) {
  constexpr float kEnd = 12.9f;
  const Vec magnitude = abs(x);
  const Vec a = min(Vec(kEnd), magnitude);
  const Vec t = Vec(1.f) / fma(a, Vec(0.3025f), Vec(1.f));
  Vec q = fma(t, Vec(0.036783650517f), Vec(-0.157532662153f));
  q = fma(q, t, Vec(0.199993997812f));
  q = fma(q, t, Vec(-0.049288745970f));
  q = fma(q, t, Vec(0.126581668854f));
  q = fma(q, t, Vec(0.101138323545f));
  q = fma(q, t, Vec(0.121694706380f));
  q = fma(q, t, Vec(0.120629034936f));
  const Vec half = Vec(-0.5f) * a;
  const Vec rounded = fma(half * a, Vec(kLog2E), Vec(kRoundMagic));
  const Vec k = rounded - Vec(kRoundMagic);
  const Vec r = fma(k, Vec(-kLn2Low), fma(half, a, k * Vec(-kLn2High)));
  const Vec e = select(magnitude.v > kEnd, Vec(0.f), exp_reduced(rounded, r));
  return fma(Vec(0.f) - a * t, q * e, max(x, Vec(0.f)));
}

// The tanh form of gelu, written as x sigmoid(2 u) so that the left tail does not cancel.
inline Vec gelu_tanh(Vec x) {
  const Vec square = x * x;
  const Vec twice_u = x * fma(square, Vec(0.0713548162726f), Vec(1.5957691216057f));
  return x / one_plus_exp_minus(twice_u);
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
