// The functions of vec.h for results that are rounded to T. For bfloat16 a relative error of 2e-4
// is allowed, a twentieth of what the rounding adds at most: tables that lie in registers, or short
// polynomials, and an approximate reciprocal where there is one.
#pragma once

#include <cstdint>

#include "accelrt/vec.h"

namespace accelrt {
namespace ACCELRT_ISA {

inline Vec coarse_reciprocal(Vec a) {
#if defined(__AVX512F__)
  return (VFloat)_mm512_rcp14_ps((__m512)a.v);
#else
  return Vec(1.f) / a;
#endif
}

#if defined(__AVX512F__)
namespace coarse {

// Of 2^(j / 32), the bits less j << 18.
alignas(64) constexpr uint32_t kExp2[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
};

// The coefficients of a^2, a and 1 in the parabola through log2(erfc(a / sqrt 2) / 2) at the
// Chebyshev nodes of the interval of width 0.4 around 0.4 j (the first begins at zero), which is
// off by 9e-5 at most.
alignas(64) constexpr float kLogTail[3][32] = {
    {
        -0.47448480f, -0.51538110f, -0.55950934f, -0.59337705f, -0.61917567f, -0.63884145f,
        -0.65391982f, -0.66558343f, -0.67469990f, -0.68190491f, -0.68766302f, -0.69231528f,
        -0.69611347f, -0.69924510f, -0.70185125f, -0.70403886f, -0.70589012f, -0.70746839f,
        -0.70882344f, -0.70999438f, -0.71101230f, -0.71190220f, -0.71268421f, -0.71337479f,
        -0.71398741f, -0.71453321f, -0.71502137f, -0.71545970f, -0.71585453f, -0.71621150f,
        -0.71653515f, -0.71682948f,
    },
    {
        -1.14996946f, -1.13083339f, -1.07849491f, -1.01125479f, -0.93939942f, -0.86888897f,
        -0.80275738f, -0.74226552f, -0.68768519f, -0.63878083f, -0.59508711f, -0.55606055f,
        -0.52115804f, -0.48987344f, -0.46175253f, -0.43639606f, -0.41345727f, -0.39263678f,
        -0.37367699f, -0.35635638f, -0.34048432f, -0.32589653f, -0.31245109f, -0.30002499f,
        -0.28851148f, -0.27781746f, -0.26786160f, -0.25857255f, -0.24988754f, -0.24175121f,
        -0.23411456f, -0.22693406f,
    },
    {
        -1.00001264f, -1.00230205f, -1.01796639f, -1.05145180f, -1.10157013f, -1.16483760f,
        -1.23739815f, -1.31587005f, -1.39759278f, -1.48060215f, -1.56351018f, -1.64537156f,
        -1.72556651f, -1.80370879f, -1.87957573f, -1.95305800f, -2.02412391f, -2.09279275f,
        -2.15911841f, -2.22317481f, -2.28504992f, -2.34483671f, -2.40263176f, -2.45853090f,
        -2.51262808f, -2.56501412f, -2.61577582f, -2.66499615f, -2.71275282f, -2.75912023f,
        -2.80416751f, -2.84796047f,
    },
};

// The entry that the lowest five bits of `index` name.
inline Vec look_up(const void* table, VUInt index) {
  const float* const entries = static_cast<const float*>(table);
  return (VFloat)_mm512_permutex2var_ps(_mm512_load_ps(entries), (__m512i)index,
                                        _mm512_load_ps(entries + kLanes));
}

}  // namespace coarse
#endif

// 2^x for x = k + rest, where t = k + kExp2Magic.
#if defined(__AVX512F__)
constexpr float kExp2Magic = 393216.f;  // 1.5 * 2^18: adding it rounds to whole 32ths

inline Vec coarse_exp2_reduced(Vec t, Vec rest) {
  const VUInt n = reinterpret_cast<VUInt>(t.v);
  const VUInt power = reinterpret_cast<VUInt>(coarse::look_up(coarse::kExp2, n).v) + (n << 18);
  // The tangent, raised by half of what it lacks at the ends.
  const Vec line = fma(rest, Vec(0.693147181f), Vec(1.0000293f));
  return Vec(reinterpret_cast<VFloat>(power)) * line;
}
#else
constexpr float kExp2Magic = kRoundMagic;

inline Vec coarse_exp2_reduced(Vec t, Vec rest) {
  Vec p = fma(rest, Vec(9.58285e-3f), Vec(5.590643e-2f));
  p = fma(p, rest, Vec(2.4024099e-1f));
  p = fma(p, rest, Vec(6.9312418e-1f));
  p = fma(p, rest, Vec(1.f));
  return reinterpret_cast<VFloat>(reinterpret_cast<VUInt>(p.v) +
                                  (reinterpret_cast<VUInt>(t.v) << 23));
}
#endif

// 2^x with a relative error below 8e-5, for x in [-126.5, 126.5].
inline Vec coarse_exp2(Vec x) {
  const Vec t = x + Vec(kExp2Magic);
  return coarse_exp2_reduced(t, x - (t - Vec(kExp2Magic)));
}

// 2^(a b), likewise.
inline Vec coarse_exp2(Vec a, Vec b) {
  const Vec t = fma(a, b, Vec(kExp2Magic));
  return coarse_exp2_reduced(t, fma(a, b, Vec(kExp2Magic) - t));
}

// 2^x for a weight: x is at most zero, and may be minus infinity. From -127 on the result is zero.
inline Vec coarse_weight(Vec x) { return coarse_exp2(max(Vec(-127.f), x)); }

template <typename T>
inline Vec silu_to(Vec x) {
  return silu(x);
}

template <>
inline Vec silu_to<bfloat16>(Vec x) {
  constexpr float kEnd = 87.f;  // of the exponential; what is beyond is below 1e-35
  const Vec from = max(Vec(-kEnd), x);
  const Vec e = coarse_exp2(min(Vec(kEnd), from), Vec(-kLog2E));
  return from * coarse_reciprocal(Vec(1.f) + e);
}

template <typename T>
inline Vec gelu_tanh_to(Vec x) {
  return gelu_tanh(x);
}

template <>
inline Vec gelu_tanh_to<bfloat16>(Vec x) {
  constexpr float kEnd = 10.f;  // there the exponent is -+126
  const Vec from = max(Vec(-kEnd), x);
  const Vec c = min(Vec(kEnd), from);
  const Vec y = fma(c * c, Vec(-0.0713548162726f * kLog2E), Vec(-1.5957691216057f * kLog2E));
  return from * coarse_reciprocal(Vec(1.f) + coarse_exp2(c, y));
}

template <typename T>
inline Vec gelu_to(Vec x) {
  return gelu(x);
}

// max(x, 0) - |x| tail(|x|) with the tail, erfc(|x| / sqrt 2) / 2, as a power of two.
template <>
inline Vec gelu_to<bfloat16>(Vec x) {
#if defined(__AVX512F__)
  constexpr float kEnd = 12.5f;  // the last interval; the tail is below 4e-36 from here on
  const Vec a = min(Vec(kEnd), abs(x));
  const VUInt interval = reinterpret_cast<VUInt>(fma(a, Vec(2.5f), Vec(kRoundMagic)).v);
  const Vec slope = fma(a, coarse::look_up(coarse::kLogTail[0], interval),
                        coarse::look_up(coarse::kLogTail[1], interval));
  const Vec tail = coarse_exp2(fma(a, slope, coarse::look_up(coarse::kLogTail[2], interval)));
#else
  // The minimax polynomial of the tail's logarithm has an error of 1.6e-4.
  constexpr float kEnd = 12.9f;  // the tail is below 3e-38 from here on
  const Vec a = min(Vec(kEnd), abs(x));
  Vec y = fma(a, Vec(2.93533695e-8f), Vec(-1.83704947e-6f));
  y = fma(y, a, Vec(4.96131579e-5f));
  y = fma(y, a, Vec(-7.64293887e-4f));
  y = fma(y, a, Vec(7.53157865e-3f));
  y = fma(y, a, Vec(-5.11385426e-2f));
  y = fma(y, a, Vec(-4.62292433e-1f));
  y = fma(y, a, Vec(-1.14930749f));
  y = fma(y, a, Vec(-1.00015962f));
  const Vec tail = coarse_exp2(y);
#endif
  return fnma(a, tail, max(x, Vec(0.f)));
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
