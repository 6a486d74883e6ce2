// What the forms of linear share: panels of the weights, the epilogues, memory in cache lines.
//
// A panel holds kColumns rows of the weights, transposed, in units of four bytes along K: two
// bfloat16 where the processor multiplies pairs of them, else one float.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "accelrt/coarse.h"
#include "accelrt/transpose.h"
#include "accelrt/unrolled.h"
#include "accelrt/vec.h"
#include "kernels/linear/linear.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace linear_parts {

constexpr int kVecs = 2;
constexpr int kColumns = kVecs * kLanes;

template <typename T>
constexpr bool kPairs =
#if defined(__AVX512BF16__)
    std::is_same_v<T, bfloat16>;
#else
    false;
#endif

// What a unit holds: elements of x and of the weights along K.
template <typename T>
constexpr int kUnit = kPairs<T> ? 2 : 1;

template <typename T>
int64_t units_of(int64_t depth) {
  return (depth + kUnit<T> - 1) / kUnit<T>;
}

// sums += unit * w, the unit at p in every lane.
template <typename T>
inline VFloat multiply_add(const void* p, VFloat w, VFloat sums) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    int32_t unit;
    std::memcpy(&unit, p, 4);
    return (VFloat)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(unit), (__m512bh)w);
  }
#endif
  float unit;
  std::memcpy(&unit, p, 4);
#if defined(__AVX512F__)
  const VFloat all = (VFloat)_mm512_set1_ps(unit);
#elif defined(__AVX2__)
  const VFloat all = (VFloat)_mm256_set1_ps(unit);
#else
  const VFloat all = VFloat{} + unit;
#endif
  return fma(Vec(all), Vec(w), Vec(sums)).v;
}

// kLanes units of a row that has `left` elements; zeros past its end.
template <typename T>
VFloat load_units(const T* p, int64_t left) {
  if constexpr (kPairs<T>) {
    VFloat r = {};
    if (left >= 2 * kLanes) {
      std::memcpy(&r, p, sizeof(r));
    } else {
      std::memcpy(&r, p, sizeof(T) * static_cast<size_t>(left));
    }
    return r;
  } else {
    return load_any(p, static_cast<int>(std::min<int64_t>(left, kLanes))).v;
  }
}

// Columns of out that a panel makes. With a GEGLU half of its vectors are gates.
inline int64_t panel_columns(const LinearParams& p) {
  return is_geglu(p.epilogue) ? kColumns / 2 : kColumns;
}

// Vector v of the panel whose columns begin at `first`: its first row of the weights, and where
// the rows of its kind end.
struct PanelRows {
  int64_t begin;
  int64_t end;
};

inline PanelRows rows_of_vector(const LinearParams& p, int64_t first, int v) {
  constexpr int kHalf = kVecs / 2;
  if (!is_geglu(p.epilogue)) return {first + v * kLanes, p.columns};
  if (v < kHalf) return {first + v * kLanes, p.columns};
  return {p.columns + first + (v - kHalf) * kLanes, 2 * p.columns};
}

// The elements [from, to) along K of the rows of the weights that make the columns from `first`, to
// panel: [units, in whole vectors][kColumns], zeros past the end.
template <typename T>
void pack(const LinearParams& p, int64_t first, int64_t from, int64_t to, float* panel) {
  const T* weight = static_cast<const T*>(p.weight) + from;
  const int64_t depth = to - from;
  const int64_t units = units_of<T>(depth);
  for (int v = 0; v < kVecs; ++v) {
    const auto [begin, end] = rows_of_vector(p, first, v);
    for (int64_t u = 0; u < units; u += kLanes) {
      const int64_t at = u * kUnit<T>;
      const T* corner = weight + begin * p.weight_stride + at;
      VFloat block[kLanes];
      if (begin + kLanes <= end && at + kLanes * kUnit<T> <= depth) {
        constexpr int64_t kAhead = 256 / static_cast<int64_t>(sizeof(T));
        unrolled<kLanes>([&](auto i) {
          const T* row = corner + i * p.weight_stride;
          __builtin_prefetch(row + kAhead, 0, 2);
          block[i] = load_units(row, depth);
        });
      } else {
        for (int i = 0; i < kLanes; ++i) {
          const T* row = corner + i * p.weight_stride;
          block[i] = begin + i < end ? load_units(row, depth - at) : VFloat{};
        }
      }
      transpose(block);
      float* target = panel + u * kColumns + v * kLanes;
      unrolled<kLanes>([&](auto i) { store(target + i * kColumns, block[i]); });
    }
  }
}

template <typename T>
Vec activated(LinearEpilogue kind, Vec y) {
  if (kind == LinearEpilogue::kGELU) return gelu_to<T>(y);
  if (kind == LinearEpilogue::kGELUTanh) return gelu_tanh_to<T>(y);
  return y;
}

// value * gelu(gate) of row `row` and the columns from `first`.
template <typename T>
void finish_geglu(const LinearParams& p, int64_t row, int64_t first, const VFloat (&sums)[kVecs]) {
  constexpr int kHalf = kVecs / 2;
  T* out = static_cast<T*>(p.out) + row * p.out_stride + first;
  const T* bias = static_cast<const T*>(p.bias);
  for (int v = 0; v < kHalf; ++v) {
    const int64_t at = v * kLanes;
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, p.columns - first - at));
    if (lanes <= 0) return;
    Vec value = sums[v];
    Vec gate = sums[kHalf + v];
    if (bias != nullptr) {
      value += load_any(bias + first + at, lanes);
      gate += load_any(bias + p.columns + first + at, lanes);
    }
    const bool tanh = p.epilogue == LinearEpilogue::kGEGLUTanh;
    store_any(out + at, lanes, value * (tanh ? gelu_tanh_to<T>(gate) : gelu_to<T>(gate)));
  }
}

// Writes the sums of row `row` and the columns from `first`.
template <typename T>
void finish(const LinearParams& p, int64_t row, int64_t first, const VFloat (&sums)[kVecs]) {
  if (is_geglu(p.epilogue)) return finish_geglu<T>(p, row, first, sums);
  T* out = static_cast<T*>(p.out) + row * p.out_stride + first;
  const T* bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + first;
  const bool residual = p.epilogue == LinearEpilogue::kGatedResidual;
  const T* gate = nullptr;
  if (p.gate != nullptr) {
    gate = static_cast<const T*>(p.gate) + row / p.rows_per_sample * p.gate_stride + first;
  }
  for (int v = 0; v < kVecs; ++v) {
    const int64_t at = v * kLanes;
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, p.columns - first - at));
    if (lanes <= 0) return;
    Vec y = sums[v];
    if (bias != nullptr) y += load_any(bias + at, lanes);
    if (!residual) {
      y = activated<T>(p.epilogue, y);
    } else if (gate == nullptr) {
      y += load_any(out + at, lanes);
    } else {
      y = fma(load_any(gate + at, lanes), y, load_any(out + at, lanes));
    }
    store_any(out + at, lanes, y);
  }
}

// A line of the cache, in which every vector of a panel begins.
struct alignas(64) Line {
  float values[16];
};

inline std::unique_ptr<Line[]> make_lines(int64_t floats) {
  constexpr int64_t kFloats = sizeof(Line) / sizeof(float);
  return std::unique_ptr<Line[]>(new Line[static_cast<size_t>((floats + kFloats - 1) / kFloats)]);
}

constexpr int64_t pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }

constexpr int64_t round_up(int64_t n, int64_t to) { return pieces(n, to) * to; }

}  // namespace linear_parts
}  // namespace ACCELRT_ISA
}  // namespace accelrt
