// Kernels with one fault each, which the simulator must report or show as NaN in what it returns.
#include "accelrt/tile.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

enum class Fault : int64_t {
  kNone = 0,
  kBlocksShareAnElement = 1,
  kSharedMemoryBeforeItIsWritten = 2,
  kCopyBeforeItIsWaitedFor = 3,
  kCopyOverWhatIsStillRead = 4,
  kCopyThatNobodyWaitsFor = 5,
  kCopyOffItsAlignment = 6,
  kShuffleForABarrier = 7,
  kTilesForABarrier = 8,
  kSharedMemoryPastItsEnd = 9,
  kNoBlocks = 10,
};

struct FaultsParams {
  const float* from = nullptr;  // [kWarpSize * 4]
  float* out = nullptr;         // [2, kWarpSize]
  Fault fault = Fault::kNone;
};

constexpr int kChunk = 4;  // floats of 16 bytes

void faults_kernel(const FaultsParams p) {
  const int lane = threadIdx.x;
  const int next = (lane + 1) % kWarpSize;
  float* const shared = reinterpret_cast<float*>(shared_memory());  // [2, kWarpSize, kChunk]
  float* const own = shared + kChunk * lane;
  float* const place = p.out + (p.fault == Fault::kBlocksShareAnElement
                                    ? lane / 2  // of another lane of the other block
                                    : blockIdx.x * kWarpSize + lane);
  if (p.fault == Fault::kBlocksShareAnElement) {
    if (lane % 2 == static_cast<int>(blockIdx.x)) *place = 1.f;
    return;
  }
  const auto request = [&](float* to) {
    copy_chunk_async(to + (p.fault == Fault::kCopyOffItsAlignment ? 1 : 0), p.from + kChunk * lane,
                     true);
    copy_commit();
  };
  if (p.fault == Fault::kSharedMemoryBeforeItIsWritten) {
    *place = *own;
    return;
  }
  request(own);
  if (p.fault == Fault::kCopyBeforeItIsWaitedFor) *place = *own;
  if (p.fault == Fault::kCopyThatNobodyWaitsFor) return;
  copy_wait<0>();
  if (p.fault == Fault::kCopyBeforeItIsWaitedFor) return;
  if (p.fault == Fault::kShuffleForABarrier) {
    *place = __shfl_sync(0xffffffffu, *own, 0) + shared[kChunk * next];
    return;
  }
  if (p.fault == Fault::kTilesForABarrier) {
    uint32_t tiles[4];
    load_tiles(tiles, own);
    *place = static_cast<float>(tiles[0]);
    return;
  }
  __syncwarp();
  float sum = shared[kChunk * next];
  if (p.fault == Fault::kSharedMemoryPastItsEnd) sum += shared[2 * kWarpSize * kChunk + lane];
  if (p.fault != Fault::kCopyOverWhatIsStillRead) __syncwarp();
  request(own);
  copy_wait<0>();
  __syncwarp();
  *place = sum + shared[kChunk * next];
}

const Register kFaults("faults", [](const Arguments& arguments) {
  FaultsParams p;
  p.from = arguments.tensor("from").ptr<float>();
  p.out = arguments.tensor("out").ptr<float>();
  p.fault = static_cast<Fault>(arguments.integer("fault"));
  LaunchConfig config;
  config.grid_x = p.fault == Fault::kNoBlocks ? 0 : 2;
  config.threads = kWarpSize;
  config.shared_bytes = 2 * kWarpSize * kChunk * sizeof(float);
  launch<faults_kernel>("faults", config, nullptr, p);
});

}  // namespace
}  // namespace accelrt::sim
