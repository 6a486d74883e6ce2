// The transformer blocks of a DiT without Python: memory from the offset planner and the arena,
// modulations and blocks from the kernels. Compares with what diffusers made (make_inputs.py).
//
//   embed_cpp FILE.safetensors [THREADS]
//
// Exits with 0 if the output is as exact as the contract asks, 1 if not, 2 on an error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "accelrt/check.h"
#include "accelrt/cpu_isa.h"
#include "accelrt/parallel.h"
#include "blocks/kernel_products.h"
#include "blocks/transformer_block.h"
#include "kernels/activation/activation.h"
#include "runtime/arena.h"
#include "runtime/offset_planner.h"
#include "safetensors.h"

namespace {

using namespace accelrt;

constexpr int64_t kAlignment = 64;

TensorView contiguous(void* data, DType dtype, std::initializer_list<int64_t> sizes) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  for (const int64_t size : sizes) view.size[view.ndim++] = size;
  int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.stride[d] = stride;
    stride *= view.size[d];
  }
  return view;
}

double value_at(const TensorView& t, int64_t index) {
  switch (t.dtype) {
    case DType::kFloat32: return t.ptr<float>()[index];
    case DType::kBFloat16: return to_float(t.ptr<bfloat16>()[index]);
    case DType::kFloat16: return to_float(t.ptr<float16>()[index]);
  }
  return NAN;
}

// |x - y| / |y|, both contiguous.
double relative_error(const TensorView& x, const TensorView& y) {
  check_same_shape("embed_cpp", "the output", x, y);
  double difference = 0.0, norm = 0.0;
  for (int64_t i = 0; i < x.numel(); ++i) {
    difference += std::pow(value_at(x, i) - value_at(y, i), 2);
    norm += std::pow(value_at(y, i), 2);
  }
  return std::sqrt(difference / norm);
}

LinearWeights linear_of(const Safetensors& file, const std::string& name) {
  return {file.tensor(name + ".weight"), file.tensor(name + ".bias")};
}

// All but the stream, the modulation and the workspace.
TransformerBlockParams block_of(const Safetensors& file, int64_t index) {
  const std::string name = "blocks." + std::to_string(index) + ".";
  TransformerBlockParams p;
  p.norm1.eps = file.number("norm1_eps");
  p.norm2.eps = file.number("norm2_eps");
  p.attention.q = linear_of(file, name + "attn1.to_q");
  p.attention.k = linear_of(file, name + "attn1.to_k");
  p.attention.v = linear_of(file, name + "attn1.to_v");
  p.attention.out = linear_of(file, name + "attn1.to_out.0");
  p.attention.heads = file.integer("heads");
  p.attention.scale = file.number("scale");
  p.feed_forward.in = linear_of(file, name + "ff.net.0.proj");
  p.feed_forward.out = linear_of(file, name + "ff.net.2");
  p.feed_forward.activation = HiddenActivation::kGELUTanh;
  return p;
}

// Steps 2 i and 2 i + 1 make the modulation of block i, and run it.
class Run {
 public:
  explicit Run(const Safetensors& file)
      : input_(file.tensor("input")), layers_(file.integer("layers")) {
    ACCELRT_CHECK(input_.ndim == 3 && layers_ >= 1, "embed_cpp: input has ", input_.ndim,
                  " dimensions, expected 3; ", layers_, " layers, expected at least 1");
    const int64_t samples = input_.size[0], width = input_.size[2];
    const int64_t element = size_of(input_.dtype);
    stream_ = buffer(input_.numel() * element, 0, 2 * layers_ - 1);
    for (int64_t i = 0; i < layers_; ++i) {
      Layer layer;
      layer.block = block_of(file, i);
      layer.conditioning = file.tensor("conditioning." + std::to_string(i));
      layer.to_modulation = linear_of(file, "blocks." + std::to_string(i) + ".norm1.linear");
      layer.block.stream = contiguous(nullptr, input_.dtype, {samples, input_.size[1], width});
      layer.block.workspace_bytes = workspace_bytes(layer.block);
      layer.activated = buffer(samples * width * element, 2 * i, 2 * i);
      layer.modulation = buffer(6 * samples * width * element, 2 * i, 2 * i + 1);
      layer.workspace = buffer(layer.block.workspace_bytes, 2 * i + 1, 2 * i + 1);
      layer_.push_back(std::move(layer));
    }
    plan_ = plan_offsets(lives_, kAlignment);
  }

  // [B, S, D], valid as long as this object lives.
  TensorView forward() {
    auto* slab =
        static_cast<unsigned char*>(::operator new(plan_.slab_bytes, std::align_val_t(kAlignment)));
    arena_.set_slab(slab, plan_.slab_bytes, std::shared_ptr<void>(slab, [](void* memory) {
                      ::operator delete(memory, std::align_val_t(kAlignment));
                    }));
    stream_block_ = take(stream_);
    std::memcpy(stream_block_.data(), input_.data, input_.numel() * size_of(input_.dtype));
    const int64_t samples = input_.size[0], width = input_.size[2];
    for (Layer& layer : layer_) {
      const ArenaBlock modulation = take(layer.modulation);
      {
        const ArenaBlock activated = take(layer.activated);
        const TensorView x = contiguous(activated.data(), input_.dtype, {samples, width});
        activation(layer.conditioning, std::nullopt, ActivationKind::kSiLU, x);
        products_.linear(x, layer.to_modulation.weight, layer.to_modulation.bias, Epilogue{},
                         contiguous(modulation.data(), input_.dtype, {samples, 6 * width}),
                         nullptr);
      }
      const ArenaBlock workspace = take(layer.workspace);
      layer.block.stream.data = stream_block_.data();
      layer.block.modulation = contiguous(modulation.data(), input_.dtype, {samples, 6, width});
      layer.block.workspace = workspace.data();
      transformer_block(layer.block, products_);
    }
    return layer_.back().block.stream;
  }

  // The run has shown the plan to be right: everything where it was planned, no byte more.
  void check_memory() const {
    const ArenaCounters counters = arena_.counters();
    ACCELRT_CHECK(counters.misplaced == 0 && counters.refused == 0,
                  "embed_cpp: ", counters.misplaced, " buffers misplaced, ", counters.refused,
                  " refused");
    ACCELRT_CHECK(counters.peak_bytes == plan_.bound_bytes, "embed_cpp: the peak was ",
                  counters.peak_bytes, " bytes, planned ", plan_.bound_bytes);
    int64_t sum = 0;
    for (const BufferLife& life : lives_) sum += life.size;
    std::printf("memory: %zu buffers of %lld bytes in a slab of %lld, peak %lld\n", lives_.size(),
                static_cast<long long>(sum), static_cast<long long>(plan_.slab_bytes),
                static_cast<long long>(counters.peak_bytes));
  }

 private:
  struct Layer {
    TransformerBlockParams block;
    TensorView conditioning;  // [B, D]
    LinearWeights to_modulation;
    size_t activated, modulation, workspace;  // buffers
  };

  size_t buffer(int64_t bytes, int64_t first, int64_t last) {
    lives_.push_back({bytes, first, last});
    return lives_.size() - 1;
  }

  ArenaBlock take(size_t index) {
    ArenaBlock block = arena_.allocate(lives_[index].size, plan_.offsets[index]);
    ACCELRT_CHECK(block, "embed_cpp: no place for buffer ", index);
    return block;
  }

  TensorView input_;  // [B, S, D]
  int64_t layers_;
  std::vector<Layer> layer_;
  std::vector<BufferLife> lives_;
  OffsetPlan plan_;
  Arena arena_{dlpack::Device{dlpack::kDLCPU, 0}, kAlignment};
  size_t stream_ = 0;
  ArenaBlock stream_block_;
  KernelProducts products_;
};

int run(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: %s FILE.safetensors [THREADS]\n", argv[0]);
    return 2;
  }
  if (argc == 3) {
    const int threads = std::atoi(argv[2]);
    ACCELRT_CHECK(threads >= 1, "THREADS is '", argv[2], "'; allowed: an integer >= 1");
    set_num_threads(threads);
  }
  const Safetensors file(argv[1]);
  Run blocks(file);
  const TensorView output = blocks.forward();
  blocks.check_memory();
  const double error = relative_error(output, file.tensor("expected"));
  const double stock = file.number("stock_error");
  const bool exact = error <= 1.1 * stock + 1e-6;  // false for NaN
  std::printf("%s, %s: relative error %.3e, of diffusers %.3e: %s\n", name_of(output.dtype),
              name_of(active_isa()), error, stock, exact ? "exact" : "NOT exact");
  return exact ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
