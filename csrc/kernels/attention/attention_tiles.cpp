// Flash attention on the tile registers of AMX; called for bfloat16 alone. As in
// attention_cpu.cpp, a unit of work is a group of queries of one head, and blocks of keys are
// packed and pass by it. Everything is transposed, so that a lane of a vector is a query:
//   scores [keys, 32 queries] = k [keys, D] q^T [D, queries]    weights = 2^(scores - top)
//   out    [D, 32 queries]   += v^T [D, keys] weights [keys, queries]
// Maximum and sum of the softmax need no step across the lanes then, and two weights of
// neighbouring keys make a word of the right operand where they are. Two tiles of rows by two of
// queries are summed at a time, so that each operand is used twice. Scores and the weights that
// take their place fit the first-level cache; the first products with values are made between the
// vector instructions of the softmax, which leave the tiles idle.
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

constexpr int64_t kBlock = 2 * kTileColumns;              // queries
constexpr int64_t kPiece = 2 * kTileRows;                 // keys
constexpr int64_t kTileWords = kTileRows * kTileColumns;  // 32-bit words of any tile
static_assert(kTileColumns == kLanes && kPiece == kTileDepth);

// Sizes of a unit, and where its parts lie in the scratch, in words.
struct Plan {
  explicit Plan(const AttentionParams& p) {
    depth = round_up(p.head_dim, kTileDepth);
    row = round_up(p.head_dim, kTileRows);
    // Scores of 32 queries take two thirds of a first-level cache of 48 KiB; keys, values, queries
    // and `out` together a part of the second-level one.
    constexpr int64_t kKeyBytes = 128 << 10;
    constexpr int64_t kQueryBytes = 224 << 10;
    constexpr int64_t kMostKeys = 256;
    constexpr int64_t kMostQueries = 512;
    const int64_t key_bytes = 2 * (depth + row);
    const int64_t most_keys = std::min(kMostKeys, kKeyBytes / key_bytes / kPiece * kPiece);
    const int64_t blocks = (p.keys + most_keys - 1) / most_keys;
    keys = round_up((p.keys + blocks - 1) / blocks, kPiece);
    const int64_t query_bytes = 2 * depth + 4 * (row + 2);
    int64_t most = std::min(kMostQueries, kQueryBytes / query_bytes / kBlock * kBlock);
    // Enough units for the threads to share, whatever their number: results do not depend on it.
    constexpr int64_t kEnough = 32;
    constexpr int64_t kFewest = 2 * kBlock;
    while (most > kFewest && p.batch * p.heads * ((p.queries + most - 1) / most) < kEnough) {
      most -= kBlock;
    }
    groups = (p.queries + most - 1) / most;
    queries = round_up((p.queries + groups - 1) / groups, kBlock);
    groups = (p.queries + queries - 1) / queries;
    const auto place = [this](int64_t count) {
      const int64_t at = total;
      total += round_up(count, 16);
      return at;
    };
    q = place(queries * depth / 2);
    out = place(queries * row);
    top = place(queries);
    sums = place(queries);
    k = place(keys * depth / 2);
    v = place(keys * row / 2);
    scores = place(keys * kBlock);
    bias = place(keys);
  }
  int64_t depth;    // D in whole tiles of an operand
  int64_t row;      // D in whole tiles of `out`
  int64_t keys;     // of a block
  int64_t queries;  // of a unit
  int64_t groups;   // of queries
  int64_t q, out, top, sums, k, v, scores, bias;
  int64_t total = 0;
};

inline void store_tile(const VFloat (&x)[kLanes], float* to) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * kLanes, Vec(x[i]));
}

// 16 rows by 32 channels, those past `rows` and `channels` zero.
inline void load_rows(const bfloat16* from, int64_t stride, int64_t rows, int64_t channels,
                      VFloat (&x)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    x[i] = i < rows ? Math::load_words(from + i * stride, channels) : VFloat{};
  }
}

// to: [padded / 16, depth / 32] tiles of [16 pairs of channels, 16 queries]; what is missing is
// zero.
void pack_queries(const bfloat16* q, int64_t stride, int64_t count, int64_t padded, int64_t dim,
                  int64_t depth, float* to) {
  for (int64_t i = 0; i < padded; i += kTileColumns) {
    for (int64_t c = 0; c < depth; c += kTileDepth) {
      VFloat x[kLanes];
      load_rows(q + i * stride + c, stride, count - i, dim - c, x);
      transpose(x);
      store_tile(x, to);
      to += kTileWords;
    }
  }
}

// to: [padded / 16, depth / 32] tiles of [16 keys, 16 pairs of channels].
void pack_keys(const bfloat16* k, int64_t stride, int64_t count, int64_t padded, int64_t dim,
               int64_t depth, float* to) {
  for (int64_t i = 0; i < padded; i += kTileRows) {
    for (int64_t c = 0; c < depth; c += kTileDepth) {
      VFloat x[kLanes];
      load_rows(k + i * stride + c, stride, count - i, dim - c, x);
      store_tile(x, to);
      to += kTileWords;
    }
  }
}

// to: [row / 16, padded / 32] tiles of [16 channels, 16 pairs of keys]. The first of the channels
// that are missing is one for every key, and its sums those of the weights; the others are zero.
void pack_values(const bfloat16* v, int64_t stride, int64_t count, int64_t padded, int64_t dim,
                 int64_t row, float* to) {
  constexpr uint32_t kOnes = 0x3f803f80u;  // two bfloat16
  for (int64_t c = 0; c < row; c += kTileRows) {
    const int channels = static_cast<int>(std::min<int64_t>(dim - c, kTileRows));
    for (int64_t key = 0; key < padded; key += kTileDepth) {
      VFloat x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t at = key + 2 * i;
        x[i] = Math::load_column_words(v + at * stride + c, stride, count - at, channels);
      }
      transpose(x);
      if (channels < kTileRows) x[channels] = reinterpret_cast<VFloat>(VUInt{} + kOnes);
      store_tile(x, to);
      to += kTileWords;
    }
  }
}

// 2^x with a relative error below 8e-5 for x in [-126, 126]; zero for what is less. A subnormal
// result would take the processor hundreds of cycles. NaN stays NaN.
inline Vec weight(Vec x) {
  const Vec f = (VFloat)_mm512_reduce_ps((__m512)x.v, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  Vec p = fma(f, Vec(0.078024514f), Vec(0.22606717f));
  p = fma(p, f, Vec(0.69583356f));
  p = fma(p, f, Vec(0.9999252f));
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x.v, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return (VFloat)_mm512_maskz_scalef_ps(normal, (__m512)p.v, (__m512)x.v);
}

// A word of two weights for each lane.
inline VUInt join_weights(Vec even, Vec odd) {
  constexpr uint32_t kHalf = 0x8000;  // of the last place of a bfloat16
  constexpr __mmask32 kHigh = 0xaaaaaaaa;
  const VUInt low = (reinterpret_cast<VUInt>(even.v) + kHalf) >> 16;
  const VUInt high = reinterpret_cast<VUInt>(odd.v) + kHalf;
  return (VUInt)_mm512_mask_blend_epi16(kHigh, (__m512i)low, (__m512i)high);
}

// A block of keys, packed in the scratch.
struct KeyBlock {
  int64_t count;             // that are there
  int64_t keys;              // in whole pieces
  bool first;                // it finds nothing in `out`
  float scale;               // with a bias; else it is a part of the factor
  float factor;              // that makes settled scores exponents of two
  const float* shared_bias;  // of all queries; null: none
  const bfloat16* bias;      // of every query; null: none
  int64_t bias_row;
};

// The queries of a unit, by which blocks of keys pass.
class Attention {
 public:
  Attention(const AttentionParams& params, const Plan& plan, const Unit<bfloat16>& unit,
            float* scratch, Tiles& tiles)
      : p_(params),
        plan_(plan),
        unit_(unit),
        scratch_(scratch),
        tiles_(tiles),
        padded_(round_up(unit.queries, kBlock)),
        depth_tiles_(plan.depth / kTileDepth),
        row_tiles_(plan.row / kTileRows) {
    pack_queries(unit.q, p_.q_stride.token, unit.queries, padded_, p_.head_dim, plan.depth,
                 scratch + plan.q);
    std::fill_n(scratch + plan.top, padded_, -FLT_MAX);
    std::memset(scratch + plan.sums, 0, static_cast<size_t>(padded_) * sizeof(float));
  }

  void pass(const KeyBlock& block) {
    block_ = block;
    const int64_t pieces = block.keys / kPiece;
    for (int64_t i = 0; i < padded_ / kBlock; ++i) {
      raised_[0] = raised_[1] = Vec(-INFINITY);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        score(i, piece);
        if (piece > 0) settle(i, piece - 1);
      }
      settle(i, pieces - 1);
      raise(i);
      if (row_tiles_ == 1) {
        weigh_and_mix<1>(i);
        continue;
      }
      weigh_and_mix<2>(i);
      for (int64_t c = 2; c < row_tiles_; c += 2) {
        if (c + 1 < row_tiles_) {
          mix<2>(i, c);
        } else {
          mix<1>(i, c);
        }
      }
    }
  }

  // The finished rows: what is in `out`, divided by the sum of its weights; zeros without any.
  void write() const {
    for (int64_t i = 0; i < unit_.queries; i += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(unit_.queries - i, kLanes));
      const int64_t tile = i / kTileColumns;
      const Vec total =
          load(sums_in_out() ? out(tile, p_.head_dim / kTileRows) + p_.head_dim % kTileRows * kLanes
                             : scratch_ + plan_.sums + i);
      const Vec inverse = select(total.v == 0.f, Vec(0.f), Vec(1.f) / total);
      for (int64_t c = 0; c < p_.head_dim; c += kLanes) {
        const int channels = static_cast<int>(std::min<int64_t>(p_.head_dim - c, kLanes));
        const float* const from = out(tile, c / kTileRows);
        VFloat x[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) x[r] = (load(from + r * kLanes) * inverse).v;
        transpose(x);
        for (int r = 0; r < count; ++r) {
          store_any(unit_.out + (i + r) * p_.out_stride.token + c, channels, Vec(x[r]));
        }
      }
    }
  }

 private:
  // A channel that is missing has the sums of the weights, if there is one.
  bool sums_in_out() const { return plan_.row > p_.head_dim; }

  // [row / 16] tiles of [16 channels, 16 queries], for each tile of queries.
  float* out(int64_t tile, int64_t channels) const {
    return scratch_ + plan_.out + (tile * row_tiles_ + channels) * kTileWords;
  }

  // Of half a block of queries: [keys / 16] tiles of scores [16 keys, 16 queries], and in their
  // place [keys / 32] tiles of weights [16 pairs of keys, 16 queries].
  float* scores(int64_t half) const { return scratch_ + plan_.scores + half * plan_.keys * kLanes; }

  // The scores of a piece of keys.
  void score(int64_t block, int64_t piece) {
    const int64_t next = depth_tiles_ * kTileWords;
    const float* k = scratch_ + plan_.k + 2 * piece * next;
    const float* q = scratch_ + plan_.q + 2 * block * next;
    float* const left = scores(0) + 2 * piece * kTileWords;
    float* const right = scores(1) + 2 * piece * kTileWords;
    if (depth_tiles_ == 2) return score_by_kept_queries(k, q, piece == 0, left, right);
    tiles_.zero<0>();
    tiles_.zero<1>();
    tiles_.zero<2>();
    tiles_.zero<3>();
    for (int64_t s = 0; s < depth_tiles_; ++s) {
      tiles_.load<4>(k, kTileBytes);
      tiles_.load<6>(q, kTileBytes);
      tiles_.multiply_add<0, 4, 6>();
      tiles_.load<7>(q + next, kTileBytes);
      tiles_.multiply_add<1, 4, 7>();
      tiles_.load<5>(k + next, kTileBytes);
      tiles_.multiply_add<2, 5, 6>();
      tiles_.multiply_add<3, 5, 7>();
      k += kTileWords;
      q += kTileWords;
    }
    tiles_.store<0>(left, kTileBytes);
    tiles_.store<1>(right, kTileBytes);
    tiles_.store<2>(left + kTileWords, kTileBytes);
    tiles_.store<3>(right + kTileWords, kTileBytes);
  }

  // Where the queries of a block are four tiles, they stay in registers for all keys.
  void score_by_kept_queries(const float* k, const float* q, bool first, float* left,
                             float* right) {
    if (first) {
      tiles_.load<4>(q, kTileBytes);
      tiles_.load<5>(q + kTileWords, kTileBytes);
      tiles_.load<6>(q + 2 * kTileWords, kTileBytes);
      tiles_.load<7>(q + 3 * kTileWords, kTileBytes);
    }
    for (int i = 0; i < 2; ++i) {
      tiles_.zero<0>();
      tiles_.zero<1>();
      tiles_.load<2>(k, kTileBytes);
      tiles_.multiply_add<0, 2, 4>();
      tiles_.multiply_add<1, 2, 6>();
      tiles_.load<3>(k + kTileWords, kTileBytes);
      tiles_.multiply_add<0, 3, 5>();
      tiles_.multiply_add<1, 3, 7>();
      tiles_.store<0>(left, kTileBytes);
      tiles_.store<1>(right, kTileBytes);
      k += 2 * kTileWords;
      left += kTileWords;
      right += kTileWords;
    }
  }

  // Takes the scores of a piece into the maxima; before that they are scaled and have the bias
  // added, if there is one.
  void settle(int64_t block, int64_t piece) {
    constexpr int kChains = 4;
    for (int64_t half = 0; half < 2; ++half) {
      float* const s = scores(half) + 2 * piece * kTileWords;
      Vec top[kChains];
      std::fill_n(top, kChains, raised_[half]);
      if (block_.shared_bias != nullptr) {
        const float* const bias = block_.shared_bias + piece * kPiece;
        for (int64_t i = 0; i < kPiece; ++i) {
          const Vec y = fma(load(s + i * kLanes), Vec(block_.scale), Vec(bias[i]));
          store(s + i * kLanes, y);
          top[0] = max(y, top[0]);
        }
      } else if (block_.bias != nullptr) {
        const int64_t query = block * kBlock + half * kTileColumns;
        add_bias(query, piece * kPiece, s, top[0]);
        add_bias(query, piece * kPiece + kTileRows, s + kTileWords, top[0]);
      } else {
#pragma GCC unroll 32
        for (int64_t i = 0; i < kPiece; ++i) {
          top[i % kChains] = max(load(s + i * kLanes), top[i % kChains]);
        }
      }
      raised_[half] = max(max(top[0], top[1]), max(top[2], top[3]));
    }
  }

  // Settles a tile of scores with a bias for every query, which is -inf past the last key.
  void add_bias(int64_t query, int64_t key, float* s, Vec& top) const {
    const int keys = static_cast<int>(std::clamp<int64_t>(block_.count - key, 0, kLanes));
    VFloat x[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const bfloat16* const row = block_.bias + (query + i) * block_.bias_row + key;
      x[i] = query + i < unit_.queries ? load_any(row, keys, -INFINITY).v : VFloat{};
    }
    transpose(x);
    for (int i = 0; i < kLanes; ++i) {
      const Vec y = fma(load(s + i * kLanes), Vec(block_.scale), Vec(x[i]));
      store(s + i * kLanes, y);
      top = max(y, top);
    }
  }

  // Raises the tops of a block of queries to the maxima of its new scores. With a slack, so that
  // what was summed up would seldom be scaled down, the largest weight would no longer be one, and
  // rounded like all others: a tenth more error for a fiftieth of the time.
  void raise(int64_t block) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t tile = 2 * block + half;
      float* const top = scratch_ + plan_.top + tile * kLanes;
      const Vec before = load(top);
      const Vec raised = max(raised_[half], before);
      if (block_.first) {
        store(top, raised);
        continue;
      }
      const VInt low = raised.v > before.v;
      if (_mm512_test_epi32_mask((__m512i)low, (__m512i)low) == 0) continue;
      const Vec fall = exp2_float((before - raised) * Vec(block_.factor));
      const Vec correction = select(low, fall, Vec(1.f));  // whatever lies in the other lanes
      store(top, raised);
      float* const sums = scratch_ + plan_.sums + tile * kLanes;
      store(sums, load(sums) * correction);
      float* const rows = out(tile, 0);
      for (int64_t c = 0; c < plan_.row * kLanes; c += kLanes) {
        store(rows + c, load(rows + c) * correction);
      }
    }
  }

  // Replaces the scores of a piece of keys by weights.
  template <bool kSum>
  void weigh(int64_t block, int64_t piece) {
    const Vec factor(block_.factor);
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t query = block * kBlock + half * kTileColumns;
      const float* const s = scores(half) + 2 * piece * kTileWords;
      float* const to = scores(half) + piece * kTileWords;
      // Finite, so that a score of -inf has no weight.
      const Vec top = max(load(scratch_ + plan_.top + query) * factor, Vec(-FLT_MAX));
      __m512 sum = (__m512)load(scratch_ + plan_.sums + query).v;
#pragma GCC unroll 4
      for (int64_t i = 0; i < kPiece; i += 2) {
        const Vec even = weight(fma(load(s + i * kLanes), factor, Vec(0.f) - top));
        const Vec odd = weight(fma(load(s + (i + 1) * kLanes), factor, Vec(0.f) - top));
        const VUInt pair = join_weights(even, odd);
        store(to + i / 2 * kLanes, Vec(reinterpret_cast<VFloat>(pair)));
        if constexpr (kSum) sum = _mm512_dpbf16_ps(sum, (__m512bh)pair, ones);
      }
      if constexpr (kSum) store(scratch_ + plan_.sums + query, Vec((VFloat)sum));
    }
  }

  void weigh(int64_t block, int64_t piece) {
    if (sums_in_out()) {
      weigh<false>(block, piece);
    } else {
      weigh<true>(block, piece);
    }
  }

  // Weighs the scores of a block, and adds the products with the first tiles of channels.
  template <int kTiles>
  void weigh_and_mix(int64_t block) {
    const int64_t pieces = block_.keys / kPiece;
    begin_mix<kTiles>(block, 0);
    weigh(block, 0);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      add_values<kTiles>(0, piece);
      if (piece + 1 < pieces) weigh(block, piece + 1);
    }
    end_mix<kTiles>(block, 0);
  }

  // Adds the products with one tile of channels, or with two.
  template <int kTiles>
  void mix(int64_t block, int64_t channels) {
    begin_mix<kTiles>(block, channels);
    for (int64_t piece = 0; piece < block_.keys / kPiece; ++piece) {
      add_values<kTiles>(channels, piece);
    }
    end_mix<kTiles>(block, channels);
  }

  template <int kTiles>
  void begin_mix(int64_t block, int64_t channels) {
    const float* const left = out(2 * block, channels);
    const float* const right = out(2 * block + 1, channels);
    if (block_.first) {
      tiles_.zero<0>();
      tiles_.zero<1>();
      if constexpr (kTiles == 2) tiles_.zero<2>();
      if constexpr (kTiles == 2) tiles_.zero<3>();
    } else {
      tiles_.load<0>(left, kTileBytes);
      tiles_.load<1>(right, kTileBytes);
      if constexpr (kTiles == 2) tiles_.load<2>(left + kTileWords, kTileBytes);
      if constexpr (kTiles == 2) tiles_.load<3>(right + kTileWords, kTileBytes);
    }
  }

  template <int kTiles>
  void add_values(int64_t channels, int64_t piece) {
    const int64_t steps = block_.keys / kTileDepth;
    const float* const v = scratch_ + plan_.v + (channels * steps + piece) * kTileWords;
    tiles_.load<4>(v, kTileBytes);
    tiles_.load<6>(scores(0) + piece * kTileWords, kTileBytes);
    tiles_.multiply_add<0, 4, 6>();
    tiles_.load<7>(scores(1) + piece * kTileWords, kTileBytes);
    tiles_.multiply_add<1, 4, 7>();
    if constexpr (kTiles == 2) {
      tiles_.load<5>(v + steps * kTileWords, kTileBytes);
      tiles_.multiply_add<2, 5, 6>();
      tiles_.multiply_add<3, 5, 7>();
    }
  }

  template <int kTiles>
  void end_mix(int64_t block, int64_t channels) {
    float* const left = out(2 * block, channels);
    float* const right = out(2 * block + 1, channels);
    tiles_.store<0>(left, kTileBytes);
    tiles_.store<1>(right, kTileBytes);
    if constexpr (kTiles == 2) tiles_.store<2>(left + kTileWords, kTileBytes);
    if constexpr (kTiles == 2) tiles_.store<3>(right + kTileWords, kTileBytes);
  }

  const AttentionParams& p_;
  const Plan& plan_;
  const Unit<bfloat16>& unit_;
  float* const scratch_;
  Tiles& tiles_;
  const int64_t padded_;  // queries in whole blocks
  const int64_t depth_tiles_;
  const int64_t row_tiles_;
  KeyBlock block_{};
  Vec raised_[2];  // maxima of the scores so far of the current block
};

void compute(const AttentionParams& p, const Plan& plan, const Unit<bfloat16>& unit, float* scratch,
             Tiles& tiles) {
  Attention attention(p, plan, unit, scratch, tiles);
  const float scale = static_cast<float>(p.scale);
  // As in attention_cpu.cpp: missing keys are masked, a negative scale is applied with a bias.
  const bool biased = p.bias != nullptr || p.keys % kPiece != 0 || scale < 0.f;
  const bool shared = p.bias_stride.token == 0;
  for (int64_t key = 0; key < p.keys; key += plan.keys) {
    KeyBlock block{};
    block.count = std::min(plan.keys, p.keys - key);
    block.keys = round_up(block.count, kPiece);
    block.first = key == 0;
    block.factor = biased ? kLog2E : scale * kLog2E;
    block.scale = scale;
    pack_keys(unit.k + key * p.k_stride.token, p.k_stride.token, block.count, block.keys,
              p.head_dim, plan.depth, scratch + plan.k);
    pack_values(unit.v + key * p.v_stride.token, p.v_stride.token, block.count, block.keys,
                p.head_dim, plan.row, scratch + plan.v);
    if (biased && shared) {
      load_bias(p.bias == nullptr ? nullptr : unit.bias + key, block.count, block.keys,
                scratch + plan.bias);
      block.shared_bias = scratch + plan.bias;
    } else if (biased) {
      block.bias = unit.bias + key;
      block.bias_row = p.bias_stride.token;
    }
    attention.pass(block);
  }
  attention.write();
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
