// The tile registers of AMX with their bfloat16 product. Eight registers hold 16 rows of 64 bytes:
// 16 floats of a sum, 32 bfloat16 of a left operand, or 16 pairs of rows of a right one:
//   sum[16, 16] += left[16, 32] right[32, 16], right stored as [16][16][2]: rows 2k and 2k + 1
//
// Two forms of the same class: the instructions and, with ACCELRT_EMULATE_TILES, what they do to
// the bit in AVX-512, so that a kernel on tiles is tested on any AVX-512 processor.
//
// The instructions are inline assembly: g++ 12's intrinsics want the register's number as a
// literal and do not say which memory ldtilecfg and tileload read. The compiler itself never uses
// the registers, so that nothing is clobbered.
#pragma once

#include <cstdint>

#include "accelrt/vec.h"

namespace accelrt {
namespace ACCELRT_ISA {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;                // of a row
constexpr int kTileColumns = kTileBytes / 4;  // floats, or pairs of bfloat16
constexpr int kTileDepth = kTileBytes / 2;    // what one product adds up

#if !defined(ACCELRT_EMULATE_TILES)

// What ldtilecfg reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of a row; the last eight stay zero
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

// The registers, from construction to destruction the calling thread's own. They are released as
// they were found: other users of the registers configure them for themselves.
class Tiles {
 public:
  Tiles() {
    const TileShapes shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }

  // Rows are `stride` bytes apart.
  template <int kTile>
  void load(const void* rows, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(rows), "r"(stride) : "memory");
  }

  template <int kTile>
  void store(void* rows, int64_t stride) const {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(rows), "r"(stride) : "memory");
  }

  template <int kSum, int kLeft, int kRight>
  void multiply_add() {
    static_assert(kSum != kLeft && kSum != kRight && kLeft != kRight, "the processor refuses it");
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  }
};

#else

// One register.
struct alignas(64) Tile {
  VUInt rows[kTileRows];
};

// sum += left right as TDPBF16PS has it. The two elements of a pair belong to two chains of fused
// additions in the order of k, both from zero; their sum is added to `sum`. Every operation rounds
// to nearest, takes subnormal numbers for zeros and gives zeros for them, whatever MXCSR says.
inline void emulate_tdpbf16ps(Tile& sum, const Tile& left, const Tile& right) {
  constexpr unsigned kNoExceptions = 0x1f80;
  constexpr unsigned kFlushToZero = 0x8000;
  constexpr unsigned kDenormalsAreZero = 0x0040;
  constexpr uint32_t kHigh = 0xffff0000u;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kNoExceptions | kFlushToZero | kDenormalsAreZero);
  // What lies between the two barriers is computed in this mode.
  asm volatile("" ::: "memory");
  Vec low[kTileRows];
  Vec high[kTileRows];
  for (int k = 0; k < kTileRows; ++k) {
    low[k] = reinterpret_cast<VFloat>(right.rows[k] << 16);
    high[k] = reinterpret_cast<VFloat>(right.rows[k] & kHigh);
  }
  for (int m = 0; m < kTileRows; m += 4) {
    Vec chains[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) chains[i][0] = chains[i][1] = Vec(0.f);
    for (int k = 0; k < kTileRows; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const VUInt pair = VUInt{} + left.rows[m + i][k];
        chains[i][0] = fma(reinterpret_cast<VFloat>(pair << 16), low[k], chains[i][0]);
        chains[i][1] = fma(reinterpret_cast<VFloat>(pair & kHigh), high[k], chains[i][1]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const Vec product = chains[i][0] + chains[i][1];
      const Vec total = Vec(reinterpret_cast<VFloat>(sum.rows[m + i])) + product;
      sum.rows[m + i] = reinterpret_cast<VUInt>(total.v);
    }
  }
  asm volatile("" ::: "memory");
  _mm_setcsr(before);
}

class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void zero() {
    static_assert(kTile >= 0 && kTile < kCount);
    tiles_[kTile] = Tile{};
  }

  template <int kTile>
  void load(const void* rows, int64_t stride) {
    static_assert(kTile >= 0 && kTile < kCount);
    const char* from = static_cast<const char*>(rows);
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(&tiles_[kTile].rows[r], from + r * stride, kTileBytes);
    }
  }

  template <int kTile>
  void store(void* rows, int64_t stride) const {
    static_assert(kTile >= 0 && kTile < kCount);
    char* to = static_cast<char*>(rows);
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(to + r * stride, &tiles_[kTile].rows[r], kTileBytes);
    }
  }

  template <int kSum, int kLeft, int kRight>
  void multiply_add() {
    static_assert(kSum != kLeft && kSum != kRight && kLeft != kRight, "the processor refuses it");
    emulate_tdpbf16ps(tiles_[kSum], tiles_[kLeft], tiles_[kRight]);
  }

 private:
  static constexpr int kCount = 8;
  Tile tiles_[kCount] = {};
};

#endif

}  // namespace ACCELRT_ISA
}  // namespace accelrt
