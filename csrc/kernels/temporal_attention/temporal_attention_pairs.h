// The arithmetic of temporal_attention_cpu.cpp for bfloat16 on processors that multiply pairs of
// them (AVX512-BF16). A word of 32 bits holds a pair: two neighbouring channels in the first
// product, two neighbouring keys in the second one.
//   q^T [words of D, T]     k [Tk, words of D]     scores [Tk, T] = k q^T, in float32
//   weights [words of Tk, T]     v [words of Tk, D]     out [T, D] = weights^T v, in float32
// Weights are rounded before they are summed, so that those used add up to one. Subnormal inputs,
// weights and results are taken for zeros.
#pragma once

#if defined(__AVX512BF16__)

#include "accelrt/coarse.h"
#include "accelrt/transpose.h"
#include "accelrt/unrolled.h"
#include "kernels/temporal_attention/temporal_attention_unit.h"

namespace accelrt {
namespace ACCELRT_ISA {
namespace {

inline VFloat multiply_pairs(VFloat sum, const float* word, VFloat words) {
  return (VFloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(*word), (__m512bh)words);
}

inline __m512i load_halves(const bfloat16* p, int64_t present) {
  if (present >= 2 * kLanes) return _mm512_loadu_si512(p);
  const auto mask = (__mmask32{1} << std::max<int64_t>(present, 0)) - 1;
  return _mm512_maskz_loadu_epi16(mask, p);
}

// Which elements of two vectors of 32 make the words (a[i], b[i]), i from `first` on.
inline __m512i interleaving(int first) {
  const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i low = _mm512_add_epi32(i, _mm512_set1_epi32(first));
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(32)), 16));
}

// Where the tiles of a unit lie in the scratch, in words.
struct PairPlan : Grouping {
  explicit PairPlan(const TemporalAttentionParams& p) : Grouping(p) {
    words = p.head_dim / 2;
    columns = round_up(p.frames, kLanes);
    // The last vector of a row runs past its words.
    row = round_up(static_cast<int>(heads) * words + kLanes, kLanes);
    vectors = (p.head_dim + kLanes - 1) / kLanes;
    key_rows = round_up(p.key_frames, kBlock);
    key_words = (p.key_frames + 1) / 2;
    calls = 4 * static_cast<int>(heads);
    q = 0;
    v = q + static_cast<int64_t>(row) * columns;
    scores = v + static_cast<int64_t>(key_words) * vectors * kLanes;
    weights = scores + static_cast<int64_t>(key_rows) * columns;
    inverse = weights + static_cast<int64_t>(key_words) * columns;
    out = inverse + columns;
    floats = out + static_cast<int64_t>(row) * columns;
  }
  static constexpr int kBlock = 16;  // keys whose scores are summed at a time
  int words;                         // of a head
  int columns;                       // T in whole vectors
  int row;                           // words between the rows of out
  int vectors;                       // of a head's channels, the last one partial
  int key_rows;
  int key_words;
  int calls;  // of the fetcher
  int64_t q, v, scores, weights, inverse, out;
  int64_t floats;
  bool aligned = true;
};

// to[words, columns] = from^T, rows past `count` zero.
inline void transpose_words(const bfloat16* from, int64_t stride, int count, int words, float* to,
                            int columns) {
  for (int t = 0; t < columns; t += kLanes) {
    for (int w = 0; w < words; w += kLanes) {
      const int64_t present = 2 * static_cast<int64_t>(words - w);
      VFloat x[kLanes];
      if (t + kLanes <= count) {
        unrolled<kLanes>(
            [&](auto i) { x[i] = (VFloat)load_halves(from + (t + i) * stride + 2 * w, present); });
      } else {
        for (int i = 0; i < kLanes; ++i) {
          x[i] = t + i < count ? (VFloat)load_halves(from + (t + i) * stride + 2 * w, present)
                               : VFloat{};
        }
      }
      transpose(x);
      unrolled<kLanes>([&](auto i) { store(to + (w + i) * columns + t, Vec(x[i])); });
    }
  }
}

// scores[kRows, columns] of kRows keys.
template <int kRows>
inline void score_pairs(const float* k, int64_t row, const float* q, int columns, int words,
                        float* scores) {
  for (int t = 0; t < columns; t += kLanes) {
    VFloat sums[kRows];
    unrolled<kRows>([&](auto r) { sums[r] = VFloat{}; });
    for (int w = 0; w < words; ++w) {
      const VFloat some = load(q + static_cast<int64_t>(w) * columns + t).v;
      unrolled<kRows>([&](auto r) { sums[r] = multiply_pairs(sums[r], k + r * row + w, some); });
    }
    unrolled<kRows>([&](auto r) { store(scores + r * columns + t, Vec(sums[r])); });
  }
}

// The weights of all keys as words, and the inverse of their sums. `factor` is in units of log 2.
inline void weigh_pairs(const PairPlan& plan, int keys, float factor, float* scratch) {
  const float* const scores = scratch + plan.scores;
  const __m512i order = interleaving(0);
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  const int columns = plan.columns;
  for (int t = 0; t < columns; t += kLanes) {
    const auto scaled = [&](int j) { return load(scores + j * columns + t) * Vec(factor); };
    Vec top = scaled(0);
    for (int j = 1; j < keys; ++j) top = max(top, scaled(j));
    const auto weight = [&](int j) {
      return (__m512)coarse_weight(fma(load(scores + j * columns + t), Vec(factor), Vec(0.f) - top))
          .v;
    };
    __m512 sums = _mm512_setzero_ps();
    for (int j = 0; j < keys; j += 2) {
      const __m256i first = (__m256i)_mm512_cvtneps_pbh(weight(j));
      const __m256i second =
          j + 1 < keys ? (__m256i)_mm512_cvtneps_pbh(weight(j + 1)) : _mm256_setzero_si256();
      const __m512i words = _mm512_permutex2var_epi16(_mm512_castsi256_si512(first), order,
                                                      _mm512_castsi256_si512(second));
      sums = _mm512_dpbf16_ps(sums, (__m512bh)words, ones);
      _mm512_store_si512(scratch + plan.weights + j / 2 * columns + t, words);
    }
    store(scratch + plan.inverse + t, Vec(1.f) / Vec((VFloat)sums));
  }
}

// A head's values as words: [words of keys][channels].
inline void interleave_values(const bfloat16* v, int64_t stride, int keys, int head_dim,
                              int vectors, float* to) {
  const __m512i low = interleaving(0);
  const __m512i high = interleaving(kLanes);
  for (int j = 0; j < keys; j += 2) {
    for (int n = 0; n < vectors; n += 2) {
      const int c = n * kLanes;
      const __m512i a = load_halves(v + j * stride + c, head_dim - c);
      const __m512i b = j + 1 < keys ? load_halves(v + (j + 1) * stride + c, head_dim - c)
                                     : _mm512_setzero_si512();
      _mm512_store_si512(to + c, _mm512_permutex2var_epi16(a, low, b));
      if (n + 1 < vectors) {
        _mm512_store_si512(to + c + kLanes, _mm512_permutex2var_epi16(a, high, b));
      }
    }
    to += vectors * kLanes;
  }
}

// out[kRows, N vectors] of bfloat16 at rows `row` words apart: the weights of kRows queries with
// the values' vectors, which lie `value_row` words apart.
template <int kRows, int N>
inline void mix_pairs(const float* weights, int columns, const float* values, int value_row,
                      int key_words, const float* inverse, int channels, bfloat16* out,
                      int64_t row) {
  VFloat sums[kRows * N];
  unrolled<kRows * N>([&](auto i) { sums[i] = VFloat{}; });
  for (int j = 0; j < key_words; ++j) {
    VFloat some[N];
    unrolled<N>([&](auto n) { some[n] = load(values + n * kLanes).v; });
    unrolled<kRows>([&](auto r) {
      unrolled<N>(
          [&](auto n) { sums[r * N + n] = multiply_pairs(sums[r * N + n], weights + r, some[n]); });
    });
    weights += columns;
    values += value_row;
  }
  unrolled<kRows>([&](auto r) {
    const __m512 share = _mm512_set1_ps(inverse[r]);
    unrolled<N>([&](auto n) {
      const __m256i result =
          (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps((__m512)sums[r * N + n], share));
      bfloat16* const to = out + r * 2 * row + n * kLanes;
      if (channels - n * kLanes >= kLanes) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), result);
      } else {
        _mm256_mask_storeu_epi16(to, first_lanes(channels - n * kLanes), result);
      }
    });
  });
}

inline void copy_row(const float* from, int64_t elements, bool past, bfloat16* to) {
  const auto* const source = reinterpret_cast<const bfloat16*>(from);
  for (int64_t c = 0; c < elements; c += 2 * kLanes) {
    const __m512i some = _mm512_load_si512(source + c);
    if (c + 2 * kLanes > elements) {
      _mm512_mask_storeu_epi16(to + c, (__mmask32{1} << (elements - c)) - 1, some);
    } else if (past) {
      stream(to + c, (VUInt)some);
    } else {
      _mm512_storeu_si512(to + c, some);
    }
  }
}

void compute_pairs(const TemporalAttentionParams& p, const PairPlan& plan, const Unit& unit,
                   const Rows& rows, const bfloat16* raw, Fetcher<bfloat16>& fetch,
                   float* scratch) {
  using T = bfloat16;
  const int columns = plan.columns;
  const int width = unit.heads * p.head_dim;
  const int row = static_cast<int>(rows.row / 2);  // in words
  transpose_words(raw, rows.row, p.frames, width / 2, scratch + plan.q, columns);
  const T* const values = rows.first(raw, rows.v);
  const float* const keys = reinterpret_cast<const float*>(rows.first(raw, rows.k));
  for (int h = 0; h < unit.heads; ++h) {
    fetch();
    for (int j = 0; j < p.key_frames; j += PairPlan::kBlock) {
      const auto run = p.key_frames - j > PairPlan::kBlock / 2 ? score_pairs<PairPlan::kBlock>
                                                               : score_pairs<PairPlan::kBlock / 2>;
      run(keys + j * row + h * plan.words, row,
          scratch + plan.q + static_cast<int64_t>(h) * plan.words * columns, columns, plan.words,
          scratch + plan.scores + j * columns);
    }
    fetch();
    weigh_pairs(plan, p.key_frames, p.scale * kLog2E, scratch);
    fetch();
    interleave_values(values + h * p.head_dim, rows.row, p.key_frames, p.head_dim, plan.vectors,
                      scratch + plan.v);
    fetch();
    T* const out = reinterpret_cast<T*>(scratch + plan.out) + h * p.head_dim;
    constexpr int kRows = 8;
    for (int t = 0; t < p.frames; t += kRows) {
      for (int n = 0; n < plan.vectors;) {
        const int left = plan.vectors - n;
        const int taken = left == 4 ? 2 : std::min(left, 3);
        const auto run = taken == 3   ? mix_pairs<kRows, 3>
                         : taken == 2 ? mix_pairs<kRows, 2>
                                      : mix_pairs<kRows, 1>;
        run(scratch + plan.weights + t, columns, scratch + plan.v + n * kLanes,
            plan.vectors * kLanes, plan.key_words, scratch + plan.inverse + t,
            p.head_dim - n * kLanes, out + t * 2 * static_cast<int64_t>(plan.row) + n * kLanes,
            plan.row);
        n += taken;
      }
    }
  }
  T* const target = const_cast<T*>(unit.tile<T>(p, p.out, p.out_stride));
  for (int t = 0; t < p.frames; ++t) {
    T* const to = target + t * p.out_stride.frame;
    copy_row(scratch + plan.out + t * static_cast<int64_t>(plan.row), width,
             plan.streams && starts_line(to), to);
  }
}

}  // namespace
}  // namespace ACCELRT_ISA
}  // namespace accelrt

#endif
