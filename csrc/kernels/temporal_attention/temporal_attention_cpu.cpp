// A unit of work is one pixel and a group of neighbouring heads, whose channels are contiguous.
// Its tiles are converted to float in a scratch that stays in the cache:
//   q^T [channels, T], k [T_k, channels], v [T_k, channels].
// Both products are the same register-blocked kernel, c = a b with the columns of b in vectors
// and single elements of a broadcast. The first one computes the scores transposed,
//   s [T_k, T] = k q^T,
// so that the softmax over the keys runs down the rows: no horizontal reduction anywhere.
// The second one is out = s^T v. All reads of a unit come before its writes, so out may be q.
#include <algorithm>
#include <type_traits>

#include "accelrt/dispatch.h"
#include "accelrt/streaming.h"
#include "accelrt/transpose.h"
#include "accelrt/vec.h"
#include "kernels/temporal_attention/temporal_attention.h"
#include "kernels/temporal_attention/temporal_attention_pairs.h"
#include "kernels/temporal_attention/temporal_attention_unit.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

// The register block: kRows broadcast rows times kVecs vectors, chosen so that the accumulators
// hide the latency of the FMA and fit the 32 or 16 registers.
#if defined(__AVX512F__)
constexpr int kRows = 8;
constexpr int kVecs = 3;
#elif defined(__AVX2__)
constexpr int kRows = 4;
constexpr int kVecs = 2;
#else
constexpr int kRows = 4;
constexpr int kVecs = 1;
#endif

// 2^x for x <= 0 (the scores less their maximum); relative error below 2e-7 (the polynomial of
// Cephes' exp2f). Results below 2^-126 are 2^-126, which is nothing in a sum that holds a one.
inline Vec exp2_nonpositive(Vec x) {
  const VFloat clamped = x.v < -126.f ? VFloat{} - 126.f : x.v;
  const VFloat magic = VFloat{} + kRoundMagic;
  const VFloat t = clamped + magic;
  const VFloat r = clamped - (t - magic);
  VFloat p = VFloat{} + 1.535336188319500e-4f;
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.f;
  const VInt exponent = reinterpret_cast<VInt>(t) - reinterpret_cast<VInt>(magic);
  return p * reinterpret_cast<VFloat>((exponent + 127) << 23);
}

// c[R, N vectors] = a b over `depth`. a is [R, depth] with rows lda apart, or with kTransposed
// [depth, R].
template <int R, int N, bool kTransposed>
inline void block_product(const float* a, int64_t lda, const float* b, int64_t ldb, int depth,
                          float* c, int64_t ldc) {
  VFloat acc[R][N] = {};
  for (int k = 0; k < depth; ++k) {
    VFloat row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = load(b + k * ldb + n * kLanes).v;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float x = kTransposed ? a[k * lda + r] : a[r * lda + k];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = acc[r][n] + x * row[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c + r * ldc + n * kLanes, acc[r][n]);
  }
}

template <int R, bool kTransposed>
inline void row_product(const float* a, int64_t lda, const float* b, int64_t ldb, int vectors,
                        int depth, float* c, int64_t ldc) {
  for (int n = 0; n < vectors;) {
    const int left = vectors - n;
    const float* const from = b + n * kLanes;
    float* const to = c + n * kLanes;
    if (kVecs >= 3 && left >= 3 && left != 4) {
      block_product<R, kVecs, kTransposed>(a, lda, from, ldb, depth, to, ldc);
      n += kVecs;
    } else if (kVecs >= 2 && left >= 2) {
      block_product<R, std::min(kVecs, 2), kTransposed>(a, lda, from, ldb, depth, to, ldc);
      n += 2;
    } else {
      block_product<R, 1, kTransposed>(a, lda, from, ldb, depth, to, ldc);
      n += 1;
    }
  }
}

// c[rows, vectors] = a b. Rows are processed in blocks, so a and c are readable and writable
// up to the next multiple of kRows; `meanwhile` is called once per block of rows.
template <bool kTransposed, typename Meanwhile>
void product(const float* a, int64_t lda, int rows, const float* b, int64_t ldb, int vectors,
             int depth, float* c, int64_t ldc, Meanwhile& meanwhile) {
  for (int r = 0; r < rows; r += kRows) {
    meanwhile();
    const float* from = kTransposed ? a + r : a + r * lda;
    if (rows - r > kRows / 2) {
      row_product<kRows, kTransposed>(from, lda, b, ldb, vectors, depth, c + r * ldc, ldc);
    } else {
      row_product<kRows / 2, kTransposed>(from, lda, b, ldb, vectors, depth, c + r * ldc, ldc);
    }
  }
}

// Softmax over the rows of s [rows, columns], whose values are in units of log 2.
inline void softmax_columns(float* s, int rows, int columns) {
  for (int at = 0; at < columns; at += kLanes) {
    Vec top = load(s + at);
    for (int j = 1; j < rows; ++j) top = max(top, load(s + j * columns + at));
    Vec total(0.f);
    for (int j = 0; j < rows; ++j) {
      float* const row = s + j * columns + at;
      const Vec p = exp2_nonpositive(load(row) - top);
      total += p;
      store(row, p);
    }
    const Vec inverse = Vec(1.f) / total;
    for (int j = 0; j < rows; ++j) {
      float* const row = s + j * columns + at;
      store(row, load(row) * inverse);
    }
  }
}

// The sizes of a unit and where its tiles lie in the scratch, in floats.
struct Plan : Grouping {
  explicit Plan(const TemporalAttentionParams& p) : Grouping(p) {
    const int lanes = kLanes;
    calls = static_cast<int>(heads) *
            ((p.frames + kRows - 1) / kRows + (p.key_frames + kRows - 1) / kRows);
    query_columns = round_up(p.frames, lanes);
    // Loads and stores of a head's last vector run past its channels, by less than a vector.
    row = round_up(static_cast<int>(heads) * p.head_dim + lanes, lanes);
    const int query_rows = round_up(p.frames, kRows);
    const int key_rows = round_up(p.key_frames, kRows);
    q = 0;
    k = q + row * query_columns;
    v = k + key_rows * row;
    s = v + key_rows * row;
    out = s + key_rows * query_columns;
    floats = out + query_rows * row;
  }
  int calls;          // of the fetcher
  int query_columns;  // T in whole vectors
  int row;            // floats between the rows of k, v and out
  int64_t q, k, v, s, out;
  int64_t floats;
};

// to[rows, width] = from, as floats.
template <typename T>
void load_tile(const T* from, int64_t stride, int rows, int width, float* to, int64_t row) {
  for (int t = 0; t < rows; ++t) {
    const T* source = from + t * stride;
    float* target = to + t * row;
    for_lanes(width, [&](int64_t i, int n) { store(target + i, load_any(source + i, n)); });
  }
}

// to[width, columns] = factor * from^T; columns past `rows` are zero. Reads and writes whole
// vectors: `from` and `to` are padded.
void transpose_tile(const float* from, int64_t row, int rows, int width, float factor, float* to,
                    int64_t columns) {
  for (int t = 0; t < columns; t += kLanes) {
    const int count = std::min(rows - t, kLanes);
    for (int c = 0; c < width; c += kLanes) {
      VFloat x[kLanes];
      if (count == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) x[i] = load(from + (t + i) * row + c).v * factor;
      } else {
        for (int i = 0; i < kLanes; ++i) {
          x[i] = i < count ? load(from + (t + i) * row + c).v * factor : VFloat{};
        }
      }
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (c + i) * columns + t, x[i]);
    }
  }
}

template <typename T>
void compute(const TemporalAttentionParams& p, const Plan& plan, const Unit& unit, const Rows& rows,
             const T* raw, Fetcher<T>& fetch, float* scratch) {
  const int width = unit.heads * p.head_dim;
  float* const q = scratch + plan.q;
  float* const k = scratch + plan.k;
  float* const v = scratch + plan.v;
  float* const s = scratch + plan.s;
  float* const out = scratch + plan.out;
  // q passes through the tile of out, which is free until then.
  load_tile(raw, rows.row, p.frames, width, out, plan.row);
  transpose_tile(out, plan.row, p.frames, width, p.scale * kLog2E, q, plan.query_columns);
  load_tile(rows.first(raw, rows.k), rows.row, p.key_frames, width, k, plan.row);
  load_tile(rows.first(raw, rows.v), rows.row, p.key_frames, width, v, plan.row);
  const int head_vectors = (p.head_dim + kLanes - 1) / kLanes;
  for (int h = 0; h < unit.heads; ++h) {
    const int at = h * p.head_dim;
    product<false>(k + at, plan.row, p.key_frames,
                   q + static_cast<int64_t>(at) * plan.query_columns, plan.query_columns,
                   plan.query_columns / kLanes, p.head_dim, s, plan.query_columns, fetch);
    softmax_columns(s, p.key_frames, plan.query_columns);
    // What a head's last vector writes past its channels, the next head overwrites.
    product<true>(s, plan.query_columns, p.frames, v + at, plan.row, head_vectors, p.key_frames,
                  out + at, plan.row, fetch);
  }
  T* const target = const_cast<T*>(unit.tile<T>(p, p.out, p.out_stride));
  for (int t = 0; t < p.frames; ++t) {
    T* const to = target + t * p.out_stride.frame;
    const float* const from = out + t * plan.row;
    if constexpr (std::is_same_v<T, float>) {
      const bool past = plan.streams && starts_line(to);
      for_pairs(
          width,
          [&](int64_t i) { store_pair(to + i, load(from + i), load(from + i + kLanes), past); },
          [&](int64_t i, int n) { store_any(to + i, n, load(from + i)); });
    } else {
      for_lanes(width, [&](int64_t i, int n) { store_any(to + i, n, load(from + i)); });
    }
  }
}

}  // namespace

void temporal_attention_cpu(const TemporalAttentionParams& p) {
#if defined(__AVX512BF16__)
  if (p.dtype == DType::kBFloat16 && p.head_dim % 2 == 0) {
    const PairPlan plan(p);
    return for_units<bfloat16>(p, plan,
                               [&](auto&&... arguments) { compute_pairs(p, plan, arguments...); });
  }
#endif
  dispatch_dtype("temporal_attention", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Plan plan(p);
    for_units<T>(p, plan,
                 [&](const Unit& unit, const Rows& rows, const T* raw, Fetcher<T>& fetch,
                     float* scratch) { compute<T>(p, plan, unit, rows, raw, fetch, scratch); });
  });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
