// A panel of the weights (see linear_parts.h) is made in the second-level cache. Blocks of kRows
// rows of x by one panel are then summed in registers: per unit, kVecs vectors of the panel are
// loaded and one unit of every row is broadcast. x is read as it lies, unless the processor has no
// products of its dtype: then a chunk of its rows is widened to float32 once for all panels.
//
// The panel is made anew in every call, which costs as much as a few rows of x (2 % of 512 rows),
// so that no copy of the weights is kept.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "accelrt/dispatch.h"
#include "accelrt/parallel.h"
#include "accelrt/unrolled.h"
#include "kernels/linear/linear_parts.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

using namespace linear_parts;

#if defined(__AVX512F__)
constexpr int kRows = 12;  // with two vectors 24 sums, of 32 registers
#else
constexpr int kRows = 6;  // 12 sums, of 16 registers
#endif
// Rows this far apart (half a way of the first-level cache) crowd each other out.
constexpr int64_t kCrowded = 2048;
// Rows of one piece of work, at most: many, to make up for its panel, and few enough for the
// second- or third-level cache, since every panel reads them again.
constexpr int64_t kChunk = 60 * kRows;
// And of one whose rows are widened: they stay in the third-level cache.
constexpr int64_t kWideFloats = int64_t{1} << 20;

// Whether the rows of x are widened before they are multiplied.
template <typename T>
constexpr bool kWiden = !kPairs<T> && !std::is_same_v<T, float>;

// The sums of kCount rows, `stride` bytes apart, with a panel. The addresses are those of every
// third row and multiples of the stride, which fit into the registers. `next`, the rows that come
// after these, is fetched along the way: for the hardware every row is a new stream.
// Not inlined: among the code around it g++ spills one of the sums in every turn.
template <typename T, int kCount>
__attribute__((noinline)) void multiply(const char* x, int64_t stride, const float* panel,
                                        int64_t units, const char* next, int64_t next_step,
                                        VFloat (&result)[kRows][kVecs]) {
  constexpr int kBases = (kCount + 2) / 3;
  VFloat sums[kCount * kVecs];
  unrolled<kCount * kVecs>([&](auto i) { sums[i] = VFloat{}; });
  const char* base[kBases];
  unrolled<kBases>([&](auto b) { base[b] = x + 3 * b * stride; });
#pragma GCC unroll 1
  for (int64_t u = 0; u < units; ++u) {
    VFloat w[kVecs];
    unrolled<kVecs>([&](auto v) { w[v] = load(panel + v * kLanes).v; });
    panel += kColumns;
    __builtin_prefetch(next, 0, 2);
    next += next_step;
    unrolled<kCount>([&](auto r) {
      unrolled<kVecs>([&](auto v) {
        VFloat& sum = sums[r * kVecs + v];
        sum = multiply_add<T>(base[r / 3] + r % 3 * stride, w[v], sum);
      });
    });
    unrolled<kBases>([&](auto b) { base[b] += 4; });
  }
  unrolled<kCount * kVecs>([&](auto i) { result[i / kVecs][i % kVecs] = sums[i]; });
}

// A third and two thirds of kRows, for the last rows: 256 rows are 21 blocks and a third.
constexpr int kFew = kRows / 3;
constexpr int kMore = 2 * kRows / 3;

// Rows [begin, end) of x in float32 to `wide`, units + kLanes apart, made up to whole blocks.
template <typename T>
void widen_rows(const LinearParams& p, int64_t begin, int64_t end, float* wide) {
  const T* x = static_cast<const T*>(p.x);
  const int64_t stride = p.depth + kLanes;
  for (int64_t row = begin; row < end; ++row) {
    const T* from = x + row * p.x_stride;
    float* to = wide + (row - begin) * stride;
    for (int64_t u = 0; u < p.depth; u += kLanes) {
      const VFloat some = load_units(from + u, p.depth - u);
      std::memcpy(to + u, &some, sizeof(some));
    }
  }
  const int64_t rows = end - begin;
  std::memset(wide + rows * stride, 0,
              sizeof(float) * static_cast<size_t>((round_up(rows, kRows) - rows) * stride));
}

// Rows [begin, end) with the panel of the columns from `first`. rows: the rows widened; or memory
// for kRows rows of x, in which they are, at the end of x, made up to kRows.
template <typename T>
void multiply_rows(const LinearParams& p, int64_t first, int64_t begin, int64_t end,
                   const float* panel, float* rows) {
  using Unit = std::conditional_t<kPairs<T>, T, float>;
  const T* x = static_cast<const T*>(p.x);
  const int64_t units = units_of<T>(p.depth);
  const bool odd = kPairs<T> && p.depth % 2 != 0;
  const int64_t row_bytes = p.x_stride * static_cast<int64_t>(sizeof(T));
  const int64_t next_step = kRows * row_bytes / std::max<int64_t>(units, 1);
  for (int64_t row = begin; row < end; row += kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, end - row));
    const char* source = reinterpret_cast<const char*>(x + row * p.x_stride);
    int64_t stride = row_bytes;
    const int taken = count <= kFew ? kFew : count <= kMore ? kMore : kRows;
    if (kWiden<T>) {
      source = reinterpret_cast<const char*>(rows + (row - begin) * (units + kLanes));
      stride = (units + kLanes) * 4;
    } else if (count < taken || odd || row_bytes % kCrowded == 0) {
      for (int r = 0; r < taken; ++r) {
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
    const char* ahead = reinterpret_cast<const char*>(next);
    if (taken == kFew) {
      multiply<Unit, kFew>(source, stride, panel, units, ahead, next_step, sums);
    } else if (taken == kMore) {
      multiply<Unit, kMore>(source, stride, panel, units, ahead, next_step, sums);
    } else {
      multiply<Unit, kRows>(source, stride, panel, units, ahead, next_step, sums);
    }
    for (int r = 0; r < count; ++r) finish<T>(p, row + r, first, sums[r]);
  }
}

template <typename T>
void run(const LinearParams& p) {
  const int64_t units = units_of<T>(p.depth);
  const int64_t wide_rows = kWideFloats / (units + kLanes) / kRows * kRows;
  const int64_t most = kWiden<T> ? std::clamp<int64_t>(wide_rows, kRows, kChunk) : kChunk;
  const int64_t chunks = pieces(p.rows, most);
  const int64_t chunk = round_up(pieces(p.rows, chunks), kRows);
  const int64_t width = panel_columns(p);
  const int64_t panels = pieces(p.columns, width);
  // Small products stay on one thread.
  constexpr int64_t kOperations = 1 << 18;
  const int64_t each = std::max<int64_t>(1, std::min(p.rows, chunk) * kColumns * p.depth);
  parallel_for(0, panels * chunks, std::max<int64_t>(1, kOperations / each),
               [&](int64_t begin, int64_t end) {
                 const int64_t panel_size = round_up(units, kLanes) * kColumns;
                 const int64_t kept = kWiden<T> ? chunk : kRows;
                 const auto memory = make_lines(panel_size + kept * (units + kLanes));
                 float* panel = memory[0].values;
                 float* rows = panel + panel_size;
                 int64_t packed = -1;
                 int64_t widened = -1;
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t first = i % panels * width;
                   const int64_t row = i / panels * chunk;
                   if (packed != first) pack<T>(p, first, 0, p.depth, panel);
                   packed = first;
                   const int64_t last = std::min(row + chunk, p.rows);
                   if (kWiden<T> && widened != row) widen_rows<T>(p, row, last, rows);
                   widened = row;
                   multiply_rows<T>(p, first, row, last, panel, rows);
                 }
               });
}

}  // namespace

void linear_cpu(const LinearParams& p) {
  dispatch_dtype("linear", p.dtype, [&](auto tag) { run<typename decltype(tag)::type>(p); });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
