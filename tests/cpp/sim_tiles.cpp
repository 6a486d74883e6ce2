// The primitives of tile.h, each against what it says: a warp multiplies whole tiles.
#include "accelrt/tile.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

constexpr int kSize = 16;                // of every side
constexpr int kRow = kSize + 8;          // three chunks: an odd number
constexpr int kTile = kSize * kRow;      // elements of a matrix in shared memory
constexpr int kChunk = kChunkBytes / 2;  // elements

struct TilesParams {
  const void* a = nullptr;   // [16, 16], contiguous like the others
  const void* b = nullptr;   // [16, 16]: keys in rows, depth in columns
  const void* d = nullptr;   // [16, 16]: depth in rows
  float* scores = nullptr;   // [16, 16] = a b^T, by load_tiles
  float* sums = nullptr;     // [16, 16] = rounded(scores) d, by load_tiles_transposed
  float* halves = nullptr;   // [16, 16] = a[:, :8] b[:, :8]^T, by loads of two tiles
  void* low_rows = nullptr;  // [8, 16] of d, from two transposed tiles
  int valid_rows = kSize;    // of a, b and d; the others are copied as zeros
};

template <typename T>
void tiles_kernel(const TilesParams p) {
  const int lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  T* const a = reinterpret_cast<T*>(shared_memory());
  T* const b = a + kTile;
  T* const d = b + kTile;
  const auto request = [&](const void* from, T* to) {
    const int row = lane / 2, column = lane % 2 * kChunk;
    copy_chunk_async(to + row * kRow + column, static_cast<const T*>(from) + row * kSize + column,
                     row < p.valid_rows);
    copy_commit();
  };
  request(p.a, a);
  request(p.b, b);
  request(p.d, d);
  copy_wait<1>();  // a and b
  __syncwarp();

  const auto store = [&](const float (&c)[4], int column, float* to) {
    for (int i = 0; i < 4; ++i) to[(g + i / 2 * 8) * kSize + column + 2 * t + i % 2] = c[i];
  };
  uint32_t left_a[4], keys[4];
  load_tiles(left_a, a + lane % 16 * kRow + lane / 16 * kChunk);
  load_tiles(keys, b + (lane / 16 * 8 + lane % 8) * kRow + lane / 8 % 2 * kChunk);
  const uint32_t first[2] = {keys[0], keys[1]}, second[2] = {keys[2], keys[3]};
  float c[2][4] = {};
  multiply_tiles<T>(c[0], left_a, first);
  multiply_tiles<T>(c[1], left_a, second);
  store(c[0], 0, p.scores);
  store(c[1], 8, p.scores);

  uint32_t low_a[2], low_keys[2];
  load_tiles(low_a, a + lane % 16 * kRow);
  load_tiles(low_keys, b + lane % 16 * kRow);
  const uint32_t half_a[4] = {low_a[0], low_a[1], 0, 0};
  for (int n = 0; n < 2; ++n) {
    const uint32_t half_b[2] = {low_keys[n], 0};
    float sum[4] = {};
    multiply_tiles<T>(sum, half_a, half_b);
    store(sum, 8 * n, p.halves);
  }

  copy_wait<0>();
  __syncwarp();
  const uint32_t weights[4] = {pack_pair<T>(c[0][0], c[0][1]), pack_pair<T>(c[0][2], c[0][3]),
                               pack_pair<T>(c[1][0], c[1][1]), pack_pair<T>(c[1][2], c[1][3])};
  uint32_t columns[4];
  load_tiles_transposed(columns, d + lane % 16 * kRow + lane / 16 * kChunk);
  for (int n = 0; n < 2; ++n) {
    const uint32_t right[2] = {columns[2 * n], columns[2 * n + 1]};
    float sum[4] = {};
    multiply_tiles<T>(sum, weights, right);
    store(sum, 8 * n, p.sums);
  }

  uint32_t two[2];  // rows 0 to 7, columns 0 to 7 and 8 to 15
  load_tiles_transposed(two, d + lane % 8 * kRow + lane / 8 % 2 * kChunk);
  for (int n = 0; n < 2; ++n) {
    float low, high;
    unpack_pair<T>(two[n], low, high);
    T* const to = static_cast<T*>(p.low_rows) + 2 * t * kSize + 8 * n + g;
    to[0] = from_float<T>(low);
    to[kSize] = from_float<T>(high);
  }
}

const Register kTiles("tiles", [](const Arguments& arguments) {
  TilesParams p;
  p.a = arguments.tensor("a").data;
  p.b = arguments.tensor("b").data;
  p.d = arguments.tensor("d").data;
  p.scores = arguments.tensor("scores").ptr<float>();
  p.sums = arguments.tensor("sums").ptr<float>();
  p.halves = arguments.tensor("halves").ptr<float>();
  p.low_rows = arguments.tensor("low_rows").data;
  p.valid_rows = static_cast<int>(arguments.integer("valid_rows"));
  LaunchConfig config;
  config.threads = kWarpSize;
  config.shared_bytes = 3 * kTile * 2;
  if (arguments.tensor("a").dtype == DType::kBFloat16) {
    launch<tiles_kernel<bfloat16>>("tiles", config, nullptr, p);
  } else {
    launch<tiles_kernel<float16>>("tiles", config, nullptr, p);
  }
});

}  // namespace
}  // namespace accelrt::sim
