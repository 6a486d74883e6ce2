// Matrix primitives of a warp on 16-bit elements, as sm_80 and later have them: the product of
// small tiles in registers, and the ways into registers and shared memory. Under the host
// simulator the lanes exchange what they hold, so that kernels on tiles run there too.
//
// A 16 x 16, B 16 x 8 and C 16 x 8 lie over the lanes as `mma.m16n8k16` wants them. With
// g = lane / 4 and t = lane % 4, a register of A or B holds two elements, the lower one first:
//   A  a[0]: row g,     columns 2t, 2t+1      a[2]: row g,     columns 2t+8, 2t+9
//      a[1]: row g + 8, columns 2t, 2t+1      a[3]: row g + 8, columns 2t+8, 2t+9
//   B  b[0]: rows 2t, 2t+1, column g          b[1]: rows 2t+8, 2t+9, column g
//   C  c[0], c[1]: row g, columns 2t, 2t+1    c[2], c[3]: row g + 8, the same columns
// Two tiles of C side by side, rounded by pack_pair, are one tile of A: {pack(c[0], c[1]),
// pack(c[2], c[3]), pack(c'[0], c'[1]), pack(c'[2], c'[3])}.
//
// Rows in shared memory that are an odd number of 16-byte chunks apart are read by load_tiles
// without bank conflicts.
#pragma once

#include <type_traits>

#include "accelrt/device.h"

namespace accelrt {

constexpr int kChunkBytes = 16;

// The bits of two elements, `low` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  static_assert(sizeof(T) == 2);
#if defined(__CUDA_ARCH__)
  uint32_t pair;  // one instruction; the conversions in types.h take six for a bfloat16
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return static_cast<uint32_t>(from_float<T>(low).bits) |
         static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#endif
}

template <typename T>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float& low, float& high) {
  static_assert(sizeof(T) == 2);
  low = to_float(T{static_cast<uint16_t>(pair & 0xffffu)});
  high = to_float(T{static_cast<uint16_t>(pair >> 16)});
}

#if defined(ACCELRT_HOST_SIM)

// c += a b, summed in float32.
template <typename T>
void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Held {
    uint32_t a[4], b[2];
  };
  Held mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const auto all = host_sim::gather(mine);
  const int lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2;  // of the pair g, g + 8
    const int column = 2 * t + i % 2;
    for (int k = 0; k < 16; k += 2) {
      const int holder = k % 8 / 2;  // the lane of four that has this pair of k
      float a0, a1, b0, b1;
      unpack_pair<T>(all[4 * g + holder].a[row + k / 8 * 2], a0, a1);
      unpack_pair<T>(all[4 * column + holder].b[k / 8], b0, b1);
      c[i] += a0 * b0 + a1 * b1;
    }
  }
}

namespace detail {

// Memory is read by the lane that gives a row's address and by those that get its elements: a race
// with either is one.
template <int kTiles, bool kTransposed>
void load_tiles_sim(uint32_t (&r)[kTiles], const void* row) {
  if (threadIdx.x % kWarpSize < 8 * kTiles) {
    unsigned char own[kChunkBytes];
    std::memcpy(own, row, kChunkBytes);
  }
  const auto rows = host_sim::gather(row);
  const int lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  for (int m = 0; m < kTiles; ++m) {
    const auto element = [&](int i, int j) {
      const void* const p = rows[8 * m + i];
      ACCELRT_CHECK(reinterpret_cast<uintptr_t>(p) % kChunkBytes == 0, "a row is not aligned");
      return static_cast<uint32_t>(static_cast<const uint16_t*>(p)[j]);
    };
    r[m] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                       : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
}

}  // namespace detail

template <int kTiles>
void load_tiles(uint32_t (&r)[kTiles], const void* row) {
  detail::load_tiles_sim<kTiles, false>(r, row);
}

template <int kTiles>
void load_tiles_transposed(uint32_t (&r)[kTiles], const void* row) {
  detail::load_tiles_sim<kTiles, true>(r, row);
}

// Copies are made at copy_wait and not before, as late as the hardware may.
inline void copy_chunk_async(void* shared, const void* global, bool valid) {
  host_sim::copies().request({shared, global, valid});
}
inline void copy_commit() { host_sim::copies().commit(); }
template <int kPending>
void copy_wait(host_sim::Place place = host_sim::Place::current()) {
  if (!host_sim::left_out.is(place)) host_sim::copies().wait(kPending);
}

#elif defined(__CUDACC__)

// c += a b, summed in float32.
template <typename T>
__device__ __forceinline__ void multiply_tiles(float (&c)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, float16>, "tiles are of 16-bit elements");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

namespace detail {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace detail

// kTiles (2 or 4) tiles of 8 x 8 from shared memory. Lane i gives the 16-byte aligned address of
// row i % 8 of tile i / 8 (with two tiles lanes 16 to 31 give any valid one) and gets of every
// tile the elements (g, 2t) and (g, 2t + 1).
template <int kTiles>
__device__ __forceinline__ void load_tiles(uint32_t (&r)[kTiles], const void* row) {
  static_assert(kTiles == 2 || kTiles == 4);
  const uint32_t address = detail::shared_address(row);
  if constexpr (kTiles == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  }
}

// The same of the transposed tiles: every lane gets the elements (2t, g) and (2t + 1, g).
template <int kTiles>
__device__ __forceinline__ void load_tiles_transposed(uint32_t (&r)[kTiles], const void* row) {
  static_assert(kTiles == 2 || kTiles == 4);
  const uint32_t address = detail::shared_address(row);
  if constexpr (kTiles == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  }
}

// 16 bytes from global to shared memory, both aligned, without waiting; zeros if not `valid`,
// when `global` is not read. The thread sees its own copies after copy_wait, the block after a
// barrier behind it.
__device__ __forceinline__ void copy_chunk_async(void* shared, const void* global, bool valid) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(detail::shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(valid ? kChunkBytes : 0)
      : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most the last kPending groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

#else  // launchers alone: see device_stubs.h

template <typename T>
void multiply_tiles(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {
  detail::never_called<void>();
}
template <int kTiles>
void load_tiles(uint32_t (&)[kTiles], const void*) {
  detail::never_called<void>();
}
template <int kTiles>
void load_tiles_transposed(uint32_t (&)[kTiles], const void*) {
  detail::never_called<void>();
}
inline void copy_chunk_async(void*, const void*, bool) { detail::never_called<void>(); }
inline void copy_commit() { detail::never_called<void>(); }
template <int kPending>
void copy_wait() {
  detail::never_called<void>();
}

#endif

}  // namespace accelrt
