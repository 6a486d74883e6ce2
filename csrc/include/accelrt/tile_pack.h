// Panels of weights for a block of sums (tile_block.h), from weights as they lie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "accelrt/tile_block.h"
#include "accelrt/transpose.h"

namespace accelrt {
namespace ACCELRT_ISA {

// A word of two bfloat16: one of the halves of `a` below one of the halves of `b`.
inline VUInt join(VUInt a, bool a_high, VUInt b, bool b_high) {
  constexpr uint32_t kLow = 0xffffu;
  return (a_high ? a >> 16 : a & kLow) | (b_high ? b & ~kLow : b << 16);
}

// 16 rows of weights, `row` elements apart, of which `rows` are there, and the first 32 channels of
// all taps, of which `left` are there: to right operands in which a lane is a row and a word a pair
// of channels. `taps` elements lie between two channels; to(tap) is where the tile of a tap goes,
// in a panel. words: [taps][16].
template <typename To>
void pack_tiles(const bfloat16* weight, int64_t row, int64_t rows, int64_t taps, int64_t left,
                VUInt* words, const To& to) {
  const int64_t count = std::min<int64_t>(left, kTileDepth) * taps;
  for (int64_t at = 0; at < taps * kTileDepth; at += kTileDepth) {
    VFloat block[kLanes];
    const int64_t here = std::clamp<int64_t>(count - at, 0, kTileDepth);
    for (int i = 0; i < kLanes; ++i) {
      block[i] = VFloat{};
      if (i >= rows || here == 0) continue;
      const bfloat16* from = weight + i * row + at;
      if (here == kTileDepth) {
        std::memcpy(&block[i], from, sizeof(VFloat));
      } else {
        std::memcpy(&block[i], from, static_cast<size_t>(here) * sizeof(bfloat16));
      }
    }
    transpose(block);
    if (taps == 1) {  // two channels lie together already
      float* const tile = to(0);
      for (int i = 0; i < kLanes; ++i) store(tile + i * kBlockColumns, Vec(block[i]));
      return;
    }
    std::memcpy(words, block, sizeof(block));
    words += kLanes;
  }
  words -= taps * kLanes;
  for (int64_t tap = 0; tap < taps; ++tap) {
    float* const tile = to(tap);
    for (int64_t pair = 0; pair < kTileRows; ++pair) {
      const int64_t a = 2 * pair * taps + tap;
      const int64_t b = a + taps;
      const VUInt joined = join(words[a / 2], a % 2 != 0, words[b / 2], b % 2 != 0);
      store(tile + pair * kBlockColumns, Vec(reinterpret_cast<VFloat>(joined)));
    }
  }
}

// The lines [begin, end) of a panel to the second-level cache.
inline void prefetch_lines(const float* panel, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) __builtin_prefetch(panel + i * kLanes, 0, 2);
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
