// A panel of kColumns rows of the weights is transposed into the second-level cache, in units of
// four bytes along K: two bfloat16 where the processor multiplies pairs of them, else one float.
// Tiles of kRows rows of x by one panel are then summed in registers: per unit, kVecs vectors of
// the panel are loaded and one unit of every row is broadcast. x is read as it lies.
//
// The panel is made anew in every call, which costs as much as a few rows of x (2 % of 512 rows),
// so that no copy of the weights is kept.
#include <algorithm>
#include <memory>
#include <type_traits>

#include "accelrt/dispatch.h"
#include "accelrt/parallel.h"
#include "accelrt/transpose.h"
#include "accelrt/unrolled.h"
#include "accelrt/vec.h"
#include "kernels/linear/linear.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 12;  // with two vectors 24 sums, of 32 registers
#else
constexpr int kRows = 6;  // 12 sums, of 16 registers
#endif
constexpr int kVecs = 2;
constexpr int kColumns = kVecs * kLanes;
// Rows this far apart (half a way of the first-level cache) crowd each other out.
constexpr int64_t kCrowded = 2048;
// Rows of one piece of work, at most: many, to make up for its panel, and few enough for the
// second- or third-level cache, since every panel reads them again.
constexpr int64_t kChunk = 60 * kRows;

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
int64_t panel_columns(const LinearParams& p) {
  return is_geglu(p.epilogue) ? kColumns / 2 : kColumns;
}

// Vector v of the panel whose columns begin at `first`: its first row of the weights, and where
// the rows of its kind end.
struct PanelRows {
  int64_t begin;
  int64_t end;
};

PanelRows rows_of_vector(const LinearParams& p, int64_t first, int v) {
  constexpr int kHalf = kVecs / 2;
  if (!is_geglu(p.epilogue)) return {first + v * kLanes, p.columns};
  if (v < kHalf) return {first + v * kLanes, p.columns};
  return {p.columns + first + (v - kHalf) * kLanes, 2 * p.columns};
}

// The rows of the weights that make the columns from `first`, to panel: [units][kColumns].
template <typename T>
void pack(const LinearParams& p, int64_t first, float* panel) {
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t units = units_of<T>(p.depth);
  for (int v = 0; v < kVecs; ++v) {
    const auto [begin, end] = rows_of_vector(p, first, v);
    for (int64_t u = 0; u < units; u += kLanes) {
      const int64_t at = u * kUnit<T>;
      const T* corner = weight + begin * p.weight_stride + at;
      float* to = panel + u * kColumns + v * kLanes;
      VFloat block[kLanes];
      if (begin + kLanes <= end && at + kLanes * kUnit<T> <= p.depth) {
        constexpr int64_t kAhead = 256 / static_cast<int64_t>(sizeof(T));
        unrolled<kLanes>([&](auto i) {
          const T* row = corner + i * p.weight_stride;
          __builtin_prefetch(row + kAhead, 0, 2);
          block[i] = load_units(row, p.depth);
        });
        transpose(block);
        unrolled<kLanes>([&](auto i) { store(to + i * kColumns, block[i]); });
        continue;
      }
      for (int i = 0; i < kLanes; ++i) {
        const T* row = corner + i * p.weight_stride;
        block[i] = begin + i < end ? load_units(row, p.depth - at) : VFloat{};
      }
      transpose(block);
      const int count = static_cast<int>(std::min<int64_t>(kLanes, units - u));
      for (int i = 0; i < count; ++i) store(to + i * kColumns, block[i]);
    }
  }
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

// The sums of kRows rows, `stride` bytes apart, with a panel. The addresses are those of every
// third row and multiples of the stride, which fit into the registers. `next`, the rows that come
// after these, is fetched along the way: for the hardware every row is a new stream.
template <typename T>
inline void multiply(const char* x, int64_t stride, const float* panel, int64_t units,
                     const char* next, int64_t next_step, VFloat (&result)[kRows][kVecs]) {
  static_assert(kRows % 3 == 0);
  constexpr int kBases = kRows / 3;
  VFloat sums[kRows * kVecs];
  unrolled<kRows * kVecs>([&](auto i) { sums[i] = VFloat{}; });
  const char* base[kBases];
  unrolled<kBases>([&](auto b) { base[b] = x + 3 * b * stride; });
#pragma GCC unroll 1
  for (int64_t u = 0; u < units; ++u) {
    VFloat w[kVecs];
    unrolled<kVecs>([&](auto v) { w[v] = load(panel + v * kLanes).v; });
    panel += kColumns;
    __builtin_prefetch(next, 0, 2);
    next += next_step;
    unrolled<kRows>([&](auto r) {
      unrolled<kVecs>([&](auto v) {
        VFloat& sum = sums[r * kVecs + v];
        sum = multiply_add<T>(base[r / 3] + r % 3 * stride, w[v], sum);
      });
    });
    unrolled<kBases>([&](auto b) { base[b] += 4; });
  }
  unrolled<kRows * kVecs>([&](auto i) { result[i / kVecs][i % kVecs] = sums[i]; });
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

// Rows [begin, end) with the panel of the columns from `first`. rows: memory for kRows rows of x,
// in which they are widened or, at the end of x, made up to kRows.
template <typename T>
void multiply_rows(const LinearParams& p, int64_t first, int64_t begin, int64_t end,
                   const float* panel, float* rows) {
  constexpr bool kWiden = !kPairs<T> && !std::is_same_v<T, float>;
  const T* x = static_cast<const T*>(p.x);
  const int64_t units = units_of<T>(p.depth);
  const bool odd = kPairs<T> && p.depth % 2 != 0;
  const int64_t row_bytes = p.x_stride * static_cast<int64_t>(sizeof(T));
  const int64_t next_step = kRows * row_bytes / std::max<int64_t>(units, 1);
  for (int64_t row = begin; row < end; row += kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, end - row));
    const char* source = reinterpret_cast<const char*>(x + row * p.x_stride);
    int64_t stride = row_bytes;
    if (kWiden || count < kRows || odd || row_bytes % kCrowded == 0) {
      for (int r = 0; r < kRows; ++r) {
        const T* from = x + (row + std::min(r, count - 1)) * p.x_stride;
        float* to = rows + r * (units + kLanes);
        for (int64_t u = 0; u < units; u += kLanes) {
          const VFloat some = load_units(from + u * kUnit<T>, p.depth - u * kUnit<T>);
          std::memcpy(to + u, &some, sizeof(some));
        }
      }
      source = reinterpret_cast<const char*>(rows);
      stride = (units + kLanes) * 4;
    }
    const T* next = x + (row + kRows < end ? row + kRows : begin) * p.x_stride;
    VFloat sums[kRows][kVecs];
    multiply<T>(source, stride, panel, units, reinterpret_cast<const char*>(next), next_step, sums);
    for (int r = 0; r < count; ++r) finish<T>(p, row + r, first, sums[r]);
  }
}

// A line of the cache, in which every vector of a panel begins.
constexpr int64_t kLine = 16;
struct alignas(64) Line {
  float values[kLine];
};

template <typename T>
void run(const LinearParams& p) {
  const int64_t units = units_of<T>(p.depth);
  const int64_t chunks = (p.rows + kChunk - 1) / kChunk;
  const int64_t even = (p.rows + chunks - 1) / chunks;
  const int64_t chunk = (even + kRows - 1) / kRows * kRows;
  const int64_t width = panel_columns(p);
  const int64_t panels = (p.columns + width - 1) / width;
  // Small products stay on one thread.
  constexpr int64_t kOperations = 1 << 18;
  const int64_t each = std::max<int64_t>(1, std::min(p.rows, chunk) * kColumns * p.depth);
  parallel_for(0, panels * chunks, std::max<int64_t>(1, kOperations / each),
               [&](int64_t begin, int64_t end) {
                 const int64_t panel_size = units * kColumns;
                 const int64_t rows_size = kRows * (units + kLanes);
                 const int64_t lines = (panel_size + rows_size + kLine - 1) / kLine;
                 const std::unique_ptr<Line[]> memory(new Line[static_cast<size_t>(lines)]);
                 float* panel = memory[0].values;
                 int64_t packed = -1;
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t first = i % panels * width;
                   const int64_t row = i / panels * chunk;
                   if (packed != first) pack<T>(p, first, panel);
                   packed = first;
                   multiply_rows<T>(p, first, row, std::min(row + chunk, p.rows), panel,
                                    panel + panel_size);
                 }
               });
}

}  // namespace

void linear_cpu(const LinearParams& p) {
  dispatch_dtype("linear", p.dtype, [&](auto tag) { run<typename decltype(tag)::type>(p); });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
