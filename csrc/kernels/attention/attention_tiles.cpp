// Flash attention on the tile registers of AMX; called for bfloat16 alone. As in
// attention_cpu.cpp, a unit of work is a group of queries of one head, blocks of keys are packed
// and pass by it, and weights take the place of their scores:
//   scores [32 rows, keys] = q [rows, D] k^T [D, keys]     weights = 2^(scores - top)
//   out    [32 rows, D]   += weights [rows, keys] v [keys, D]
// Two tiles of rows by two tiles of columns are summed at a time, so that each operand is used
// twice. Queries and weights are left operands as they lie in a row. The right ones are packed:
// keys are transposed in pairs of channels, values interleaved in pairs of keys. The softmax runs
// along the rows that the tiles of scores were stored to, which fit the first-level cache.
#include <algorithm>
#include <cfloat>
#include <cstring>

#include "accelrt/parallel.h"
#include "accelrt/tiles.h"
#include "accelrt/transpose.h"
#include "kernels/attention/attention_parts.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

using namespace attention_parts;
using Math = Bfloat16Math;

constexpr int64_t kRows = 2 * kTileRows;
constexpr int64_t kTileFloats = kTileRows * kTileColumns;  // words of any tile
static_assert(kTileColumns == kLanes);

// Sizes of a unit, and where its parts lie in the scratch, in words of 32 bits.
struct Plan {
  explicit Plan(const AttentionParams& p) {
    depth = round_up(p.head_dim, kTileDepth);
    row = round_up(p.head_dim, kTileColumns);
    // Scores of 32 rows take two thirds of a first-level cache of 48 KiB; keys, values, queries
    // and `out` together a part of the second-level one.
    constexpr int64_t kKeyBytes = 128 << 10;
    constexpr int64_t kQueryBytes = 224 << 10;
    constexpr int64_t kMostKeys = 256;
    constexpr int64_t kMostQueries = 512;
    const int64_t key_bytes = 2 * (depth + row);
    const int64_t most_keys = std::min(kMostKeys, kKeyBytes / key_bytes / kTileDepth * kTileDepth);
    const int64_t blocks = (p.keys + most_keys - 1) / most_keys;
    keys = round_up((p.keys + blocks - 1) / blocks, kTileDepth);
    score_row = keys + 16;  // an odd number of cache lines: rows in different sets
    const int64_t query_bytes = 2 * depth + 4 * (row + kLanes + 1);
    int64_t most = std::min(kMostQueries, kQueryBytes / query_bytes / kRows * kRows);
    // Enough units for the threads to share, whatever their number: results do not depend on it.
    constexpr int64_t kEnough = 32;
    constexpr int64_t kFewest = 2 * kRows;
    while (most > kFewest && p.batch * p.heads * ((p.queries + most - 1) / most) < kEnough) {
      most -= kRows;
    }
    groups = (p.queries + most - 1) / most;
    queries = round_up((p.queries + groups - 1) / groups, kTileRows);
    groups = (p.queries + queries - 1) / queries;
    const auto place = [this](int64_t count) {
      const int64_t at = total;
      total += round_up(count, 16);
      return at;
    };
    const int64_t padded = round_up(queries, kRows);
    q = place(padded * depth / 2);
    out = place(padded * row);
    top = place(padded);
    sums = place(padded * kLanes);
    k = place(keys * depth / 2);
    v = place(keys * row / 2);
    scores = place(kRows * score_row);
    bias = place(p.bias_stride.token == 0 ? keys : kRows * keys);
  }
  int64_t depth;  // D in whole tiles of an operand
  int64_t row;    // D in whole tiles of `out`
  int64_t keys;   // of a block
  int64_t score_row;
  int64_t queries;  // of a unit
  int64_t groups;   // of queries
  int64_t q, out, top, sums, k, v, scores, bias;
  int64_t total = 0;
};

// to: [padded, depth] bfloat16; what is missing is zero.
void pack_queries(const bfloat16* q, int64_t stride, int64_t rows, int64_t padded, int64_t dim,
                  int64_t depth, float* to) {
  for (int64_t i = 0; i < padded; ++i) {
    for (int64_t c = 0; c < depth; c += kTileDepth) {
      const VFloat x = i < rows ? Math::load_words(q + i * stride + c, dim - c) : VFloat{};
      store(to, Vec(x));
      to += kLanes;
    }
  }
}

// to: [keys / 16, depth / 32] tiles, each [16 pairs of channels, 16 keys]; keys past `count` and
// channels past `dim` are zero.
void pack_keys(const bfloat16* k, int64_t stride, int64_t count, int64_t padded, int64_t dim,
               int64_t depth, float* to) {
  for (int64_t key = 0; key < padded; key += kTileColumns) {
    for (int64_t c = 0; c < depth; c += kTileDepth) {
      VFloat x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = key + i < count ? Math::load_words(k + (key + i) * stride + c, dim - c) : VFloat{};
      }
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(to + i * kLanes, Vec(x[i]));
      to += kTileFloats;
    }
  }
}

// to: [row / 16, keys / 32] tiles, each [16 pairs of keys, 16 channels]; what is missing is zero.
void pack_values(const bfloat16* v, int64_t stride, int64_t count, int64_t padded, int64_t dim,
                 int64_t row, float* to) {
  for (int64_t c = 0; c < row; c += kTileColumns) {
    const int columns = static_cast<int>(std::min<int64_t>(dim - c, kTileColumns));
    for (int64_t key = 0; key < padded; key += 2) {
      store(to, Vec(Math::load_column_words(v + key * stride + c, stride, count - key, columns)));
      to += kLanes;
    }
  }
}

// sums[kRowTiles, kColumnTiles] of 16 by 16 floats, rows sum_row floats apart, += left right over
// `steps` tiles. left has rows of `left_row` words; right_next words lie between the tiles of
// right that make different columns. The first block finds nothing in the sums.
template <int kRowTiles, int kColumnTiles>
void multiply(Tiles& tiles, const float* left, int64_t left_row, const float* right,
              int64_t right_next, int64_t steps, bool first, float* sums, int64_t sum_row) {
  constexpr bool kLower = kRowTiles == 2;
  constexpr bool kSecond = kColumnTiles == 2;
  constexpr int64_t kWord = sizeof(float);
  const int64_t left_stride = left_row * kWord;
  const int64_t sum_stride = sum_row * kWord;
  float* const lower = sums + kTileRows * sum_row;
  if (first) {
    tiles.zero<0>();
    if constexpr (kSecond) tiles.zero<1>();
    if constexpr (kLower) tiles.zero<2>();
    if constexpr (kLower && kSecond) tiles.zero<3>();
  } else {
    tiles.load<0>(sums, sum_stride);
    if constexpr (kSecond) tiles.load<1>(sums + kTileColumns, sum_stride);
    if constexpr (kLower) tiles.load<2>(lower, sum_stride);
    if constexpr (kLower && kSecond) tiles.load<3>(lower + kTileColumns, sum_stride);
  }
  for (int64_t s = 0; s < steps; ++s) {
    tiles.load<4>(left, left_stride);
    tiles.load<6>(right, kTileBytes);
    tiles.multiply_add<0, 4, 6>();
    if constexpr (kSecond) {
      tiles.load<7>(right + right_next, kTileBytes);
      tiles.multiply_add<1, 4, 7>();
    }
    if constexpr (kLower) {
      tiles.load<5>(left + kTileRows * left_row, left_stride);
      tiles.multiply_add<2, 5, 6>();
      if constexpr (kSecond) tiles.multiply_add<3, 5, 7>();
    }
    left += kTileBytes / kWord;
    right += kTileFloats;
  }
  tiles.store<0>(sums, sum_stride);
  if constexpr (kSecond) tiles.store<1>(sums + kTileColumns, sum_stride);
  if constexpr (kLower) tiles.store<2>(lower, sum_stride);
  if constexpr (kLower && kSecond) tiles.store<3>(lower + kTileColumns, sum_stride);
}

// A block of keys, packed in the scratch.
struct KeyBlock {
  int64_t keys;  // in whole tiles of depth
  bool first;
  const float* bias;  // null: none
  int64_t bias_row;   // 0: one row for all queries
};

// The maximum of a row of scores, which are scaled and have the bias added if there is one.
float settle(float* scores, int64_t count, float scale, const float* bias) {
  Vec top(-INFINITY);
  if (bias == nullptr) {
    for (int64_t i = 0; i < count; i += kLanes) top = max(load(scores + i), top);
  } else {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec y = fma(load(scores + i), Vec(scale), load(bias + i));
      store(scores + i, y);
      top = max(y, top);
    }
  }
  return max_of(top);
}

// One block of keys for the queries [query, query + rows).
template <int kRowTiles>
void attend(const Plan& plan, float* scratch, int64_t query, int64_t rows, const KeyBlock& block,
            float scale, Tiles& tiles) {
  float* const scores = scratch + plan.scores;
  const float* const q = scratch + plan.q + query * plan.depth / 2;
  const int64_t depth_steps = plan.depth / kTileDepth;
  const int64_t next_keys = depth_steps * kTileFloats;
  for (int64_t key = 0; key < block.keys; key += 2 * kTileColumns) {
    multiply<kRowTiles, 2>(tiles, q, plan.depth / 2, scratch + plan.k + key * plan.depth / 2,
                           next_keys, depth_steps, true, scores + key, plan.score_row);
  }

  const float factor = block.bias == nullptr ? scale * kLog2E : kLog2E;
  float* const out = scratch + plan.out + query * plan.row;
  for (int64_t r = 0; r < rows; ++r) {
    float* const row = scores + r * plan.score_row;
    const float* const bias = block.bias == nullptr ? nullptr : block.bias + r * block.bias_row;
    const float raised = settle(row, block.keys, scale, bias);
    weigh_row<Math>(raised, factor, block.first, block.keys, plan.row,
                    scratch[plan.top + query + r], scratch + plan.sums + (query + r) * kLanes,
                    out + r * plan.row, row);
  }

  const int64_t key_steps = block.keys / kTileDepth;
  const int64_t next_channels = key_steps * kTileFloats;
  const float* values = scratch + plan.v;
  for (int64_t c = 0; c < plan.row; c += 2 * kTileColumns) {
    const auto mix = plan.row - c > kTileColumns ? multiply<kRowTiles, 2> : multiply<kRowTiles, 1>;
    mix(tiles, scores, plan.score_row, values, next_channels, key_steps, block.first, out + c,
        plan.row);
    values += 2 * next_channels;
  }
}

void compute(const AttentionParams& p, const Plan& plan, const Unit<bfloat16>& unit, float* scratch,
             Tiles& tiles) {
  const int64_t padded = round_up(unit.queries, kRows);
  pack_queries(unit.q, p.q_stride.token, unit.queries, padded, p.head_dim, plan.depth,
               scratch + plan.q);
  std::fill_n(scratch + plan.top, padded, -FLT_MAX);
  std::memset(scratch + plan.sums, 0, static_cast<size_t>(padded) * kLanes * sizeof(float));
  const float scale = static_cast<float>(p.scale);
  // As in attention_cpu.cpp: missing keys are masked, a negative scale is applied with a bias.
  const bool biased = p.bias != nullptr || p.keys % kTileDepth != 0 || scale < 0.f;
  const bool shared = p.bias_stride.token == 0;
  for (int64_t key = 0; key < p.keys; key += plan.keys) {
    const int64_t count = std::min(plan.keys, p.keys - key);
    const int64_t padded_keys = round_up(count, kTileDepth);
    pack_keys(unit.k + key * p.k_stride.token, p.k_stride.token, count, padded_keys, p.head_dim,
              plan.depth, scratch + plan.k);
    pack_values(unit.v + key * p.v_stride.token, p.v_stride.token, count, padded_keys, p.head_dim,
                plan.row, scratch + plan.v);
    float* const bias = biased ? scratch + plan.bias : nullptr;
    if (biased && shared) {
      load_bias(p.bias == nullptr ? nullptr : unit.bias + key, count, padded_keys, bias);
    }
    const KeyBlock block{padded_keys, key == 0, bias, shared ? 0 : plan.keys};
    for (int64_t i = 0; i < unit.queries; i += kRows) {
      const int64_t rows = std::min(kRows, unit.queries - i);
      if (biased && !shared) {
        for (int64_t r = 0; r < rows; ++r) {
          load_bias(unit.bias + (i + r) * p.bias_stride.token + key, count, padded_keys,
                    bias + r * plan.keys);
        }
      }
      const auto run = rows > kTileRows ? attend<2> : attend<1>;
      run(plan, scratch, i, rows, block, scale, tiles);
    }
  }
  for (int64_t i = 0; i < unit.queries; ++i) {
    write_row(scratch + plan.out + i * plan.row, scratch + plan.sums + i * kLanes, p.head_dim,
              unit.out + i * p.out_stride.token);
  }
}

}  // namespace

void attention_cpu(const AttentionParams& p) {
  const Plan plan(p);
  const int64_t units = p.batch * p.heads * plan.groups;
  const int64_t unit_flops = 4 * plan.queries * p.keys * p.head_dim;
  constexpr int64_t kGrainFlops = 1 << 22;
  SharedIndices::run(units, kGrainFlops / unit_flops, [&](const auto& next) {
    const AlignedFloats scratch = make_aligned(plan.total);
    Tiles tiles;
    for (int64_t i = next(); i >= 0; i = next()) {
      compute(p, plan, Unit<bfloat16>(p, plan.queries, plan.groups, i), scratch.get(), tiles);
    }
  });
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
