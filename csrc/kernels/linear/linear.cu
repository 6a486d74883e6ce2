#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"
#include "kernels/linear/linear.cuh"
#include "runtime/device_info.h"

namespace accelrt {
namespace {

constexpr int kLargeTile = 128;
constexpr int kSmallTile = 64;

int64_t tiles(int64_t n, int64_t length) { return (n + length - 1) / length; }

int64_t weight_rows(const LinearParams& p) {
  return is_geglu(p.epilogue) ? 2 * p.columns : p.columns;
}

// Rounds in which the multiprocessors, one block each, are through with all tiles.
int64_t waves(const LinearParams& p, int tile, int multiprocessors) {
  return tiles(tiles(p.rows, tile) * tiles(weight_rows(p), tile), multiprocessors);
}

// A small tile has a quarter of the large one's work, and reads twice as much for it. It is taken
// where rounding up to whole waves and whole tiles makes the large one at least a quarter slower:
// few rows, mostly.
bool small_is_better(const LinearParams& p) {
  const int multiprocessors = current_device_info().multiprocessors;
  return 5 * waves(p, kSmallTile, multiprocessors) <= 4 * 4 * waves(p, kLargeTile, multiprocessors);
}

bool can_move_eight(const LinearParams& p) {
  const auto rows_aligned = [](const void* pointer, int64_t stride, int64_t rows) {
    return aligned_to(pointer, kChunkBytes) && (rows <= 1 || stride % 8 == 0);
  };
  return rows_aligned(p.out, p.out_stride, p.rows) && rows_aligned(p.gate, p.gate_stride, p.rows) &&
         aligned_to(p.bias, kChunkBytes) && (!is_geglu(p.epilogue) || p.columns % 8 == 0);
}

template <typename Traits>
void launch_one(const LinearParams& p, Stream stream) {
  LinearLaunch arguments;
  arguments.p = p;
  arguments.wide = can_move_eight(p);
  arguments.row_tiles = static_cast<int>(tiles(p.rows, Traits::kRows));
  arguments.column_tiles = static_cast<int>(tiles(p.columns, Traits::kColumns));
  LaunchConfig config;
  config.grid_x = int64_t{arguments.row_tiles} * arguments.column_tiles;
  config.threads = Traits::kThreads;
  config.shared_bytes = Traits::kSharedBytes;
  launch<linear_kernel<Traits>>("linear", config, stream, arguments);
}

template <typename T>
void launch_type(const LinearParams& p, Stream stream) {
  const bool small = small_is_better(p);
  dispatch_bool(is_geglu(p.epilogue), [&](auto geglu) {
    constexpr bool kGEGLU = decltype(geglu)::value;
    if (small) {
      launch_one<LinearTraits<T, kSmallTile, kSmallTile, 64, 3, kGEGLU>>(p, stream);
    } else {
      launch_one<LinearTraits<T, kLargeTile, kLargeTile, 32, 2, kGEGLU>>(p, stream);
    }
  });
}

}  // namespace

void launch_linear(const LinearParams& p, Stream stream) {
  if (p.dtype == DType::kBFloat16) {
    launch_type<bfloat16>(p, stream);
  } else {
    ACCELRT_CHECK(p.dtype == DType::kFloat16, "linear: no CUDA kernel for ", name_of(p.dtype));
    launch_type<float16>(p, stream);
  }
}

}  // namespace accelrt
