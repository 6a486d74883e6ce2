#include "accelrt/dispatch.h"
#include "accelrt/rows_launch.h"
#include "kernels/layer_norm/layer_norm.cuh"

namespace accelrt {
namespace {

constexpr int kItems = 4;

bool can_vectorise(const LayerNormParams& p, int64_t lanes) {
  if (p.width % lanes != 0) return false;
  for (const auto* t : {&p.x, &p.residual, &p.inject, &p.out, &p.residual_out}) {
    if (!aligned_to(t->data, 16) || t->batch_stride % lanes != 0 || t->row_stride % lanes != 0) {
      return false;
    }
  }
  for (const auto* t : {&p.gate, &p.scale, &p.shift}) {
    if (!aligned_to(t->data, 16) || t->batch_stride % lanes != 0) return false;
  }
  return aligned_to(p.weight, 16) && aligned_to(p.bias, 16) && aligned_to(p.inject_scale, 16);
}

template <typename Traits>
void launch_one(const LayerNormParams& p, Stream stream) {
  constexpr int64_t kBlockThreads = 128;  // at least; four rows of a warp each
  constexpr int64_t kPerThread = Traits::kVec * (Traits::kItems > 0 ? Traits::kItems : 4);
  int64_t row_threads = kWarpSize;
  while (row_threads < Traits::kMaxThreads && row_threads * kPerThread < p.width) row_threads *= 2;
  LaunchConfig config;
  if (row_threads == kWarpSize) {
    const int64_t rows_per_block = kBlockThreads / kWarpSize;
    config.threads = kBlockThreads;
    config.grid_x = (p.batch * p.rows + rows_per_block - 1) / rows_per_block;
  } else {
    config.threads = static_cast<int>(row_threads);
    config.grid_x = p.batch * p.rows;
    config.shared_bytes = Traits::kSharedFloats * sizeof(float);
  }
  // The kernel loops over what is left.
  config.grid_x = std::min<int64_t>(config.grid_x, 1 << 30);
  launch<layer_norm_kernel<Traits>>("layer_norm", config, stream,
                                    LayerNormLaunch{p, static_cast<int>(row_threads)});
}

template <typename T, bool kResidual>
void launch_layout(const LayerNormParams& p, Stream stream) {
  constexpr int kVec = 16 / sizeof(T);
  using Registers = LayerNormTraits<T, kVec, kItems, kResidual>;
  if (can_vectorise(p, kVec) && p.width <= Registers::kMaxThreads * kVec * kItems) {
    launch_one<Registers>(p, stream);
  } else {
    launch_one<LayerNormTraits<T, 1, 0, kResidual>>(p, stream);
  }
}

}  // namespace

void launch_layer_norm(const LayerNormParams& p, Stream stream) {
  dispatch_dtype("layer_norm", p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.residual.data != nullptr) {
      launch_layout<T, true>(p, stream);
    } else {
      launch_layout<T, false>(p, stream);
    }
  });
}

}  // namespace accelrt
