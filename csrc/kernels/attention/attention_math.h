// The two arithmetics of attention_cpu.cpp. Operands of its products are tiles of 32-bit words,
// a word being what one lane multiplies at a time: a float, or two neighbouring bfloat16 whose
// products are added (AVX512-BF16). Sums are floats in both.
#pragma once

#include <algorithm>

#include "accelrt/coarse.h"
#include "accelrt/vec.h"

namespace accelrt {
namespace ACCELRT_ISA {

typedef float VHalf __attribute__((vector_size(kLanes * 2)));

// 2^x for x <= 126; relative error below 2e-7. -inf gives 0.
inline Vec exp2_float(Vec x) {
#if defined(__AVX512F__)
  // x less its integer part, which scalef takes from x itself.
  const Vec f = (VFloat)_mm512_reduce_ps((__m512)x.v, _MM_FROUND_TO_NEG_INF);
  Vec p = fma(f, Vec(1.8775767e-3f), Vec(8.989341e-3f));
  p = fma(p, f, Vec(5.5826318e-2f));
  p = fma(p, f, Vec(2.4015361e-1f));
  p = fma(p, f, Vec(6.931531e-1f));
  p = fma(p, f, Vec(9.9999994e-1f));
  return (VFloat)_mm512_scalef_ps((__m512)p.v, (__m512)x.v);
#else
  const VFloat clamped = x.v < -126.f ? VFloat{} - 126.f : x.v;
  const Vec t = Vec(clamped) + Vec(kRoundMagic);
  const Vec f = Vec(clamped) - (t - Vec(kRoundMagic));
  Vec p = fma(f, Vec(1.3276472e-3f), Vec(9.675542e-3f));
  p = fma(p, f, Vec(5.550713e-2f));
  p = fma(p, f, Vec(2.402212e-1f));
  p = fma(p, f, Vec(6.9314694e-1f));
  p = fma(p, f, Vec(1.0000001f));
  const VFloat power =
      reinterpret_cast<VFloat>(reinterpret_cast<VUInt>(p.v) + (reinterpret_cast<VUInt>(t.v) << 23));
  return x.v < -126.f ? VFloat{} : power;
#endif
}

struct FloatMath {
  static constexpr int kElements = 1;  // of a word

  static VFloat madd(VFloat sum, float a, VFloat b) { return sum + a * b; }
  static VHalf madd(VHalf sum, float a, VHalf b) { return sum + a * b; }

  // Words of `elements` of a row (at most a vector of words); the others are zero.
  template <typename T>
  static VFloat load_words(const T* row, int64_t elements) {
    return load_any(row, static_cast<int>(std::min<int64_t>(elements, kLanes))).v;
  }

  // The words of a group of kElements rows, of which the last ones may be missing, at `n`
  // columns.
  template <typename T>
  static VFloat load_column_words(const T* rows, int64_t, int64_t present, int n) {
    return present > 0 ? load_any(rows, n).v : VFloat{};
  }

  // Replaces `count` scores (whole vectors) by the weights 2^(factor (s - top)), as words; returns
  // their sum in parts.
  static Vec weigh(float* s, int64_t count, float factor, float top) {
    constexpr int kUnroll = 2;
    Vec sums[kUnroll] = {Vec(0.f), Vec(0.f)};
    const auto step = [&](int64_t i, int n) {
      const Vec p = exp2_float((load(s + i) - Vec(top)) * Vec(factor));
      store(s + i, p);
      sums[n] += p;
    };
    int64_t i = 0;
    for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
      step(i, 0);
      step(i + kLanes, 1);
    }
    if (i < count) step(i, 0);
    return sums[0] + sums[1];
  }
};

#if defined(__AVX512BF16__)
// The products are those of vdpbf16ps, which takes subnormal inputs for zeros.
struct Bfloat16Math {
  static constexpr int kElements = 2;

  static VFloat madd(VFloat sum, float a, VFloat b) {
    return (VFloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  }
  static VHalf madd(VHalf sum, float a, VHalf b) {
    return (VHalf)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm256_set1_ps(a), (__m256bh)b);
  }

  static VFloat load_words(const bfloat16* row, int64_t elements) {
    const __mmask32 present = elements >= 32 ? ~__mmask32{0} : (__mmask32{1} << elements) - 1;
    return (VFloat)_mm512_maskz_loadu_epi16(present, row);
  }

  static VFloat load_column_words(const bfloat16* rows, int64_t stride, int64_t present, int n) {
    const __mmask16 columns = static_cast<__mmask16>((1u << n) - 1u);
    const __mmask16 first = present > 0 ? columns : __mmask16{0};
    const __mmask16 second = present > 1 ? columns : __mmask16{0};
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, rows));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, rows + stride));
    return (VFloat)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }

  // The sum is that of the rounded weights, so that the weights used add up to one.
  static Vec weigh(float* s, int64_t count, float factor, float top) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    const auto weight = [&](int64_t i) {
      return (__m512)coarse_weight((load(s + i) - Vec(top)) * Vec(factor)).v;
    };
    __m512 sum = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      const __m512bh pair = _mm512_cvtne2ps_pbh(weight(i + kLanes), weight(i));
      _mm512_storeu_si512(s + i / 2, (__m512i)pair);
      sum = _mm512_dpbf16_ps(sum, pair, ones);
    }
    if (i < count) {
      const __m256i one = (__m256i)_mm512_cvtneps_pbh(weight(i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(s + i / 2), one);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_zextsi256_si512(one), ones);
    }
    return (VFloat)sum;
  }
};
#endif

}  // namespace ACCELRT_ISA
}  // namespace accelrt
