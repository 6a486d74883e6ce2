// A block of sums on the tile registers: two tiles of rows by two of columns, so that every operand
// is used twice. Registers 0 to 3 hold the sums, 4 and 5 the left operand, 6 and 7 the right one.
#pragma once

#include <cstdint>

#include "accelrt/tiles.h"

namespace accelrt {
namespace ACCELRT_ISA {

constexpr int64_t kBlockRows = 2 * kTileRows;
constexpr int64_t kBlockColumns = 2 * kTileColumns;
constexpr int64_t kBlockSums = kBlockRows * kBlockColumns;
constexpr int64_t kBlockStride = kBlockColumns * sizeof(float);

// The sums from memory, [rows, kBlockColumns], or zeros.
template <int kRowTiles>
inline void begin_block(Tiles& tiles, bool first, const float* sums) {
  const float* const lower = sums + kTileRows * kBlockColumns;
  if (first) {
    tiles.zero<0>();
    tiles.zero<1>();
    if constexpr (kRowTiles == 2) {
      tiles.zero<2>();
      tiles.zero<3>();
    }
  } else {
    tiles.load<0>(sums, kBlockStride);
    tiles.load<1>(sums + kTileColumns, kBlockStride);
    if constexpr (kRowTiles == 2) {
      tiles.load<2>(lower, kBlockStride);
      tiles.load<3>(lower + kTileColumns, kBlockStride);
    }
  }
}

// sums += rows panel over `steps` tiles along K. The rows of the upper and of the lower tile begin
// at these places, `stride` bytes apart; a panel is [steps * 16 pairs][kBlockColumns][2].
template <int kRowTiles>
inline void add_to_block(Tiles& tiles, const char* upper, const char* lower, int64_t stride,
                         const float* panel, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s) {
    tiles.load<4>(upper, stride);
    tiles.load<6>(panel, kBlockStride);
    tiles.load<7>(panel + kTileColumns, kBlockStride);
    tiles.multiply_add<0, 4, 6>();
    tiles.multiply_add<1, 4, 7>();
    if constexpr (kRowTiles == 2) {
      tiles.load<5>(lower, stride);
      tiles.multiply_add<2, 5, 6>();
      tiles.multiply_add<3, 5, 7>();
    }
    upper += kTileBytes;
    lower += kTileBytes;
    panel += kTileRows * kBlockColumns;
  }
}

template <int kRowTiles>
inline void end_block(const Tiles& tiles, float* sums) {
  float* const lower = sums + kTileRows * kBlockColumns;
  tiles.store<0>(sums, kBlockStride);
  tiles.store<1>(sums + kTileColumns, kBlockStride);
  if constexpr (kRowTiles == 2) {
    tiles.store<2>(lower, kBlockStride);
    tiles.store<3>(lower + kTileColumns, kBlockStride);
  }
}

}  // namespace ACCELRT_ISA
}  // namespace accelrt
