// A feed-forward layer by slices of rows, so that the hidden activations exist for one slice only:
//
//   out = ff(x)      or      out += gate * ff(x)
//
// A slice whose hidden activations stay in the last cache is read from there by the second product;
// longer ones cost memory alone. The products come from `Products`; nothing is allocated.
#pragma once

#include "blocks/products.h"

namespace accelrt {

struct LinearWeights {
  TensorView weight;  // [N, K]
  OptionalView bias;  // [N]
};

// The numbers are those of the operators' `activation`.
enum class HiddenActivation : int { kGELU = 0, kGELUTanh = 1, kGEGLU = 2, kGEGLUTanh = 3 };

constexpr bool is_geglu(HiddenActivation kind) {
  return kind == HiddenActivation::kGEGLU || kind == HiddenActivation::kGEGLUTanh;
}

struct FeedForward {
  LinearWeights in;   // [F, K], or [2 F, K] of a GEGLU: the values, then their gates
  LinearWeights out;  // [N, F]
  HiddenActivation activation = HiddenActivation::kGELU;
  int64_t rows = 0;  // whose hidden activations exist at once; 0: all
};

struct FeedForwardParams {
  TensorView x;  // [M, K]; the last strides of all are one, the row strides free
  FeedForward layers;
  // out += gate * ff(x). gate: [M / rows_per_sample, N]; none: ones.
  bool add = false;
  OptionalView gate;
  int64_t rows_per_sample = 1;
  TensorView out;           // [M, N]; overlaps no input
  void* scratch = nullptr;  // aligned to 64 bytes
  int64_t scratch_bytes = 0;
};

// Throws an Error that names what does not fit; scratch and rows are not looked at.
void check(const FeedForwardParams& params);

// Rows of the longest slice with layers.rows: with a gate that many within one sample, or whole
// samples.
int64_t feed_forward_slice(const FeedForwardParams& params);

// How much scratch slices of layers.rows need; pointers are not looked at.
int64_t feed_forward_scratch_bytes(const FeedForwardParams& params);

// The most rows, in slices of about equal length, whose scratch is within `bytes`; 0 if there is
// none.
int64_t feed_forward_rows(const FeedForwardParams& params, int64_t bytes);

// For scratch of this size the hidden activations of a slice stay in the cache: half of the second
// level of the current GPU, beside which weights pass through; 8 MiB on a CPU, below which slices
// are too short to make up for the weights that every one of them reads, and 64 MiB for bfloat16
// where it has tile registers and packs them.
int64_t feed_forward_cache_bytes(Device device, DType dtype);

void feed_forward(const FeedForwardParams& params, Products& products, Stream stream = nullptr);

}  // namespace accelrt
