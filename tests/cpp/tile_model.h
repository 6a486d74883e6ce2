// TDPBF16PS in double precision, element by element as the instruction set reference has it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace accelrt::tiles {

// One register: 16 rows of 64 bytes, as floats or as pairs of bfloat16.
struct Tile {
  uint32_t words[16][16];
};

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// A zero of the same sign for a subnormal number.
inline double without_subnormal(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? x * 0. : x; }

// To the nearest float, a tie to the even one; a zero for what is subnormal after rounding.
inline float rounded(double sum, double error) {
  if (std::isfinite(sum) && error != 0) {
    // sum + error is exact. Rounding it to odd first makes the second rounding that of the exact
    // value.
    uint64_t bits;
    std::memcpy(&bits, &sum, 8);
    if (bits % 2 == 0) sum = std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
  }
  if (std::abs(sum) < 0x1p-100 && std::abs(static_cast<float>(sum * 0x1p100)) < 0x1p-26f) {
    return std::signbit(sum) ? -0.f : 0.f;
  }
  return static_cast<float>(sum);
}

// a * b + c. The product of two bfloat16, or of a float with one, is exact in double precision.
inline float fused(float a, float b, float c) {
  const double product = without_subnormal(a) * without_subnormal(b);
  const double addend = without_subnormal(c);
  const double sum = product + addend;
  const double part = sum - product;
  return rounded(sum, (product - (sum - part)) + (addend - part));
}

inline void model_tdpbf16ps(Tile& sum, const Tile& left, const Tile& right) {
  for (int m = 0; m < 16; ++m) {
    float chains[2 * 16] = {};
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        const uint32_t a = left.words[m][k];
        const uint32_t b = right.words[k][n];
        chains[2 * n] = fused(float_of(a << 16), float_of(b << 16), chains[2 * n]);
        chains[2 * n + 1] =
            fused(float_of(a & 0xffff0000u), float_of(b & 0xffff0000u), chains[2 * n + 1]);
      }
    }
    for (int n = 0; n < 16; ++n) {
      const float product = fused(chains[2 * n], 1.f, chains[2 * n + 1]);
      sum.words[m][n] = bits_of(fused(product, 1.f, float_of(sum.words[m][n])));
    }
  }
}

}  // namespace accelrt::tiles
