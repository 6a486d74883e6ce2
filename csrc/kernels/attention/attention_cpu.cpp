// Flash attention: a unit of work is a group of queries of one head, and blocks of keys pass by
// it. Keys and values of a block are packed once per unit into tiles that stay in the L2 cache,
// so that both products are the same register-blocked kernel: the right operand in vectors, single
// words of the left one broadcast (a word: see attention_math.h).
//   scores [rows, keys] = q [rows, D] k^T [D, keys]     weights = 2^(scores - top)
//   out    [rows, D]   += weights [rows, keys] v [keys, D]
// Weights take the place of their scores. The maximum of a row's scores so far is `top`; where a
// block of keys raises it, what is in `out` and in the sums is scaled down.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "accelrt/dispatch.h"
#include "accelrt/parallel.h"
#include "accelrt/transpose.h"
#include "kernels/attention/attention_parts.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

using namespace attention_parts;

// The register block: kRows broadcast rows times at most kVecs vectors, chosen so that the
// accumulators hide the latency of the multiplication and fit the 32 or 16 registers.
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
// Half a vector costs half as much where a vector is executed in two parts, as on Zen 4, and no
// more than a vector elsewhere.
constexpr bool kHalves = kLanes == 16;
// Longer sums are computed in parts, as a matrix product of the library would: the rounding error
// of one long chain shows in float32.
constexpr int64_t kChain = 128;

// Vectors of the next tile when `left` of them are to be done: no lonely one, and the widest at the
// end, where half a vector may be.
inline int tile_width(int left) {
  if (kVecs >= 3 && left % 3 == 0) return 3;
  return std::min({left, kVecs, 2});
}

template <typename Fn>
void dispatch_width(int width, const Fn& fn) {
  if constexpr (kVecs >= 3) {
    if (width == 3) return fn(std::integral_constant<int, 3>{});
  }
  if constexpr (kVecs >= 2) {
    if (width == 2) return fn(std::integral_constant<int, 2>{});
  }
  fn(std::integral_constant<int, 1>{});
}

// Sizes of a unit, and where its tiles lie in the scratch, in words of 32 bits.
struct Plan {
  Plan(const AttentionParams& p, int elements) {
    words = (p.head_dim + elements - 1) / elements;
    row = round_up(p.head_dim, kLanes);
    vectors = static_cast<int>(row / kLanes);
    half = kHalves && row - p.head_dim >= kLanes / 2;
    // Half of an L2 cache of 1 MiB: more keys in a block save passes over `out`, more queries in
    // a unit save packing.
    constexpr int64_t kKeyWords = 40960;
    constexpr int64_t kQueryWords = 69632;
    constexpr int64_t kMostKeys = 512;
    constexpr int64_t kMostQueries = 512;
    const int64_t key_words = words + row / elements;
    const int64_t most_keys =
        std::min(kMostKeys, kKeyWords / key_words / (kVecs * kLanes) * (kVecs * kLanes));
    const int64_t blocks = (p.keys + most_keys - 1) / most_keys;
    keys = std::min(most_keys, round_up((p.keys + blocks - 1) / blocks, kVecs * kLanes));
    keys = std::min(keys, round_up(p.keys, kLanes));
    score_row = keys + 16;  // an odd number of cache lines more or less: rows in different sets
    const int64_t query_words = words + row + kLanes + 1;
    int64_t most = std::min(kMostQueries, kQueryWords / query_words / kRows * kRows);
    // Enough units for the threads to share, whatever their number: results do not depend on it.
    constexpr int64_t kEnough = 16;
    constexpr int64_t kFewest = 8 * kRows;
    while (most > kFewest && p.batch * p.heads * ((p.queries + most - 1) / most) < kEnough) {
      most -= kRows;
    }
    groups = (p.queries + most - 1) / most;
    queries = round_up((p.queries + groups - 1) / groups, kRows);
    groups = (p.queries + queries - 1) / queries;
    const auto place = [this](int64_t count) {
      const int64_t at = total;
      total += round_up(count, 16);
      return at;
    };
    q = place(queries * words);
    out = place(queries * row);
    top = place(queries);
    sums = place(queries * kLanes);
    k = place(keys * words);
    v = place(keys / elements * row);
    scores = place(kRows * score_row);
    highest = place(kRows * kLanes);
    bias = place(p.bias_stride.token == 0 ? keys : kRows * keys);
  }
  int64_t words;  // of a query or key
  int64_t row;    // of `out`: D in whole vectors
  int vectors;    // of `out`
  bool half;      // the last of them holds kLanes / 2 channels at most
  int64_t keys;   // of a block, in whole vectors
  int64_t score_row;
  int64_t queries;  // of a unit
  int64_t groups;   // of queries
  int64_t q, out, top, sums, k, v, scores, highest, bias;
  int64_t total = 0;
};

// to[padded, words]; rows past the end are zero.
template <typename M, typename T>
void pack_queries(const T* q, int64_t stride, int64_t rows, int64_t padded, int64_t dim,
                  int64_t words, float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t w = 0; w < words; w += kLanes) {
      const VFloat x = M::load_words(q + i * stride + w * M::kElements, dim - w * M::kElements);
      store_any(to + i * words + w, static_cast<int>(std::min<int64_t>(words - w, kLanes)), Vec(x));
    }
  }
  std::memset(to + rows * words, 0, static_cast<size_t>((padded - rows) * words) * sizeof(float));
}

// Tiles of up to kVecs vectors of keys, each [words, keys of the tile]; keys past `count` are
// zero.
template <typename M, typename T>
void pack_keys(const T* k, int64_t stride, int64_t count, int vectors, int64_t dim, int64_t words,
               float* to) {
  for (int first = 0; first < vectors;) {
    const int width = tile_width(vectors - first);
    for (int n = 0; n < width; ++n) {
      const int64_t key = static_cast<int64_t>(first + n) * kLanes;
      const int present = static_cast<int>(std::min<int64_t>(count - key, kLanes));
      for (int64_t w = 0; w < words; w += kLanes) {
        VFloat x[kLanes];
        const T* const from = k + key * stride + w * M::kElements;
        for (int i = 0; i < kLanes; ++i) {
          x[i] = i < present ? M::load_words(from + i * stride, dim - w * M::kElements) : VFloat{};
        }
        transpose(x);
        const int rows = static_cast<int>(std::min<int64_t>(words - w, kLanes));
        float* const target = to + (w * width + n) * kLanes;
        for (int i = 0; i < rows; ++i) store(target + i * width * kLanes, Vec(x[i]));
      }
    }
    to += words * width * kLanes;
    first += width;
  }
}

// Tiles of up to kVecs vectors of channels, each [groups of keys, channels of the tile].
template <typename M, typename T>
void pack_values(const T* v, int64_t stride, int64_t count, int64_t padded, int64_t dim,
                 int vectors, float* to) {
  for (int first = 0; first < vectors;) {
    const int width = tile_width(vectors - first);
    for (int64_t key = 0; key < padded; key += M::kElements) {
      for (int n = 0; n < width; ++n) {
        const int64_t column = static_cast<int64_t>(first + n) * kLanes;
        const int columns = static_cast<int>(std::min<int64_t>(dim - column, kLanes));
        const T* const from = v + key * stride + column;
        store(to + n * kLanes, Vec(M::load_column_words(from, stride, count - key, columns)));
      }
      to += width * kLanes;
    }
    first += width;
  }
}

template <int N, bool kHalf>
struct Row {
  VFloat full[std::max(N - kHalf, 1)];
  VHalf half;
};

// acc[R, N vectors] += a b over `depth` words; a is [R, depth] with rows lda apart, b [depth, N
// vectors]. With kHalf the last vector is computed in its lower half alone.
template <typename M, int R, int N, bool kHalf>
inline void multiply(const float* a, int64_t lda, const float* b, int64_t depth,
                     Row<N, kHalf> (&acc)[R]) {
  constexpr int kFull = N - kHalf;
  for (int64_t k = 0; k < depth; ++k) {
    VFloat full[std::max(kFull, 1)];
    VHalf half{};
#pragma GCC unroll 4
    for (int n = 0; n < kFull; ++n) full[n] = load(b + n * kLanes).v;
    if constexpr (kHalf) std::memcpy(&half, b + kFull * kLanes, sizeof(half));
    b += N * kLanes;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float x = a[r * lda + k];
#pragma GCC unroll 4
      for (int n = 0; n < kFull; ++n) acc[r].full[n] = M::madd(acc[r].full[n], x, full[n]);
      if constexpr (kHalf) acc[r].half = M::madd(acc[r].half, x, half);
    }
  }
}

// scores[R, N vectors of keys] of the tile `keys` [words, N vectors], and their maxima in
// highest[R, one vector]. With kBias they are scaled and have bias[R, N vectors] added,
// rows bias_row apart; without, they are the bare products.
template <typename M, int R, int N, bool kBias>
void score(const float* q, int64_t words, const float* keys, float scale, const float* bias,
           int64_t bias_row, float* scores, int64_t score_row, float* highest) {
  Row<N, false> acc[R] = {};
  multiply<M, R, N, false>(q, words, keys, std::min(words, kChain), acc);
  if (words > kChain) [[unlikely]] {
    Row<N, false> rest[R] = {};
    multiply<M, R, N, false>(q + kChain, words, keys + kChain * N * kLanes, words - kChain, rest);
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) acc[r].full[n] += rest[r].full[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Vec top = load(highest + r * kLanes);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Vec y = acc[r].full[n];
      if constexpr (kBias) y = fma(y, Vec(scale), load(bias + r * bias_row + n * kLanes));
      store(scores + r * score_row + n * kLanes, y);
      top = max(y, top);
    }
    store(highest + r * kLanes, top);
  }
}

// out[R, N vectors] += weights values; `values` is the tile [depth, N vectors]. The first block of
// keys finds nothing in `out`.
template <typename M, int R, int N, bool kHalf>
void mix(const float* weights, int64_t score_row, const float* values, int64_t depth, bool first,
         float* out, int64_t row) {
  constexpr int kFull = N - kHalf;
  Row<N, kHalf> acc[R] = {};
  multiply<M, R, N, kHalf>(weights, score_row, values, depth, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* const to = out + r * row;
#pragma GCC unroll 4
    for (int n = 0; n < kFull; ++n) {
      const Vec before = first ? Vec(0.f) : load(to + n * kLanes);
      store(to + n * kLanes, before + Vec(acc[r].full[n]));
    }
    if constexpr (kHalf) {
      VHalf before{};
      if (!first) std::memcpy(&before, to + kFull * kLanes, sizeof(VHalf));
      before += acc[r].half;
      std::memcpy(to + kFull * kLanes, &before, sizeof(VHalf));
    }
  }
}

// A block of keys, packed in the scratch.
struct KeyBlock {
  int vectors;
  bool first;
  const float* bias;  // null: none
  int64_t bias_row;   // 0: one row for all queries
};

// One block of keys for the R queries from `query` on.
template <typename M, int R>
void attend(const Plan& plan, float* scratch, int64_t query, const KeyBlock& block, float scale) {
  const float* const q = scratch + plan.q + query * plan.words;
  float* const scores = scratch + plan.scores;
  float* const highest = scratch + plan.highest;
  std::fill_n(highest, R * kLanes, -INFINITY);
  const float* keys = scratch + plan.k;
  for (int at = 0; at < block.vectors;) {
    const int width = tile_width(block.vectors - at);
    float* const to = scores + at * kLanes;
    dispatch_width(width, [&](auto n) {
      constexpr int kWidth = decltype(n)::value;
      if (block.bias == nullptr) {
        score<M, R, kWidth, false>(q, plan.words, keys, scale, nullptr, 0, to, plan.score_row,
                                   highest);
      } else {
        score<M, R, kWidth, true>(q, plan.words, keys, scale, block.bias + at * kLanes,
                                  block.bias_row, to, plan.score_row, highest);
      }
    });
    keys += plan.words * width * kLanes;
    at += width;
  }

  const int64_t count = static_cast<int64_t>(block.vectors) * kLanes;
  const float factor = block.bias == nullptr ? scale * kLog2E : kLog2E;
  float* const out = scratch + plan.out + query * plan.row;
  for (int r = 0; r < R; ++r) {
    weigh_row<M>(max_of(load(highest + r * kLanes)), factor, block.first, count, plan.row,
                 scratch[plan.top + query + r], scratch + plan.sums + (query + r) * kLanes,
                 out + r * plan.row, scores + r * plan.score_row);
  }

  const int64_t depth = count / M::kElements;
  const float* values = scratch + plan.v;
  for (int at = 0; at < plan.vectors;) {
    const int width = tile_width(plan.vectors - at);
    float* const to = out + at * kLanes;
    const bool half = plan.half && at + width == plan.vectors;
    dispatch_width(width, [&](auto n) {
      constexpr int kWidth = decltype(n)::value;
      if constexpr (kHalves) {
        if (half) {
          mix<M, R, kWidth, true>(scores, plan.score_row, values, depth, block.first, to, plan.row);
          return;
        }
      }
      mix<M, R, kWidth, false>(scores, plan.score_row, values, depth, block.first, to, plan.row);
    });
    values += depth * width * kLanes;
    at += width;
  }
}

template <typename M, typename T>
void compute(const AttentionParams& p, const Plan& plan, const Unit<T>& unit, float* scratch) {
  const int64_t padded = round_up(unit.queries, kRows);
  pack_queries<M>(unit.q, p.q_stride.token, unit.queries, padded, p.head_dim, plan.words,
                  scratch + plan.q);
  std::fill_n(scratch + plan.top, padded, -FLT_MAX);
  std::memset(scratch + plan.sums, 0, static_cast<size_t>(padded) * kLanes * sizeof(float));
  const float scale = static_cast<float>(p.scale);
  // The missing keys of the last vector are masked; and a negative scale is applied where a bias
  // would be, so that the largest product always gives the largest score.
  const bool biased = p.bias != nullptr || p.keys % kLanes != 0 || scale < 0.f;
  const bool shared = p.bias_stride.token == 0;
  for (int64_t key = 0; key < p.keys; key += plan.keys) {
    const int64_t count = std::min(plan.keys, p.keys - key);
    const int vectors = static_cast<int>((count + kLanes - 1) / kLanes);
    const int64_t padded_keys = static_cast<int64_t>(vectors) * kLanes;
    pack_keys<M>(unit.k + key * p.k_stride.token, p.k_stride.token, count, vectors, p.head_dim,
                 plan.words, scratch + plan.k);
    pack_values<M>(unit.v + key * p.v_stride.token, p.v_stride.token, count, padded_keys,
                   p.head_dim, plan.vectors, scratch + plan.v);
    float* const bias = biased ? scratch + plan.bias : nullptr;
    if (biased && shared) {
      load_bias(p.bias == nullptr ? nullptr : unit.bias + key, count, padded_keys, bias);
    }
    const KeyBlock block{vectors, key == 0, bias, shared ? 0 : plan.keys};
    for (int64_t i = 0; i < unit.queries; i += kRows) {
      if (biased && !shared) {
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t query = std::min(i + r, unit.queries - 1);
          load_bias(unit.bias + query * p.bias_stride.token + key, count, padded_keys,
                    bias + r * plan.keys);
        }
      }
      const auto run = unit.queries - i > kRows / 2 ? attend<M, kRows> : attend<M, kRows / 2>;
      run(plan, scratch, i, block, scale);
    }
  }
  for (int64_t i = 0; i < unit.queries; ++i) {
    write_row(scratch + plan.out + i * plan.row, scratch + plan.sums + i * kLanes, p.head_dim,
              unit.out + i * p.out_stride.token);
  }
}

template <typename M, typename T>
void run(const AttentionParams& p) {
  const Plan plan(p, M::kElements);
  const int64_t units = p.batch * p.heads * plan.groups;
  const int64_t unit_flops = 4 * plan.queries * p.keys * p.head_dim;
  constexpr int64_t kGrainFlops = 1 << 20;
  parallel_for(0, units, kGrainFlops / unit_flops, [&](int64_t begin, int64_t end) {
    const AlignedFloats scratch = make_aligned(plan.total);
    for (int64_t i = begin; i < end; ++i) {
      compute<M, T>(p, plan, Unit<T>(p, plan.queries, plan.groups, i), scratch.get());
    }
  });
}

}  // namespace

void attention_cpu(const AttentionParams& p) {
#if defined(__AVX512BF16__)
  if (p.dtype == DType::kBFloat16) return run<Bfloat16Math, bfloat16>(p);
#endif
  dispatch_dtype("attention", p.dtype,
                 [&](auto tag) { run<FloatMath, typename decltype(tag)::type>(p); });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
