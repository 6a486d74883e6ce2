// The forward of a transformer block with adaLN modulation, in place on its residual stream:
//
//   x += gate_a * attention(norm(x) * (1 + scale_a) + shift_a)
//   x += cross_attention(x, context)                              (if there is one)
//   x += gate_f * ff(norm(x) * (1 + scale_f) + shift_f)
//
// Products and attention come from `Products`, the rest from our kernels; nothing is allocated.
#pragma once

#include "blocks/feed_forward.h"

namespace accelrt {

struct NormWeights {
  OptionalView weight;  // [D]; none: ones
  OptionalView bias;    // [D]; none: zeros
  double eps = 1e-5;
};

struct AttentionWeights {
  LinearWeights q;                 // [I, D], I = heads * head dim; [3 I, D] if k and v are none
  std::optional<LinearWeights> k;  // [I, D], or [I, E] of a context of width E
  std::optional<LinearWeights> v;
  LinearWeights out;  // [D, I]
  int64_t heads = 1;
  double scale = 1.0;
  OptionalView mask;  // added to the scores: [B or 1, H or 1, S or 1, L]
};

// Keys and values come from `context` by the weights k and v, or are given.
struct CrossAttention {
  AttentionWeights weights;
  OptionalView context;  // [B, L, E], rows contiguous
  OptionalView keys;     // [B, L, H, head dim]
  OptionalView values;
};

struct TransformerBlockParams {
  TensorView stream;      // [B, S, D], contiguous; the result
  TensorView modulation;  // [B, 6, D]: shift, scale, gate of the attention, then of the ff
  NormWeights norm1;
  NormWeights norm2;
  AttentionWeights attention;
  int64_t heads_per_slice = 0;  // of `attention`, whose keys and values exist at once; 0: all
  std::optional<CrossAttention> cross;
  FeedForward feed_forward;
  void* workspace = nullptr;  // aligned to 64 bytes
  int64_t workspace_bytes = 0;
};

// Throws an Error that names what does not fit.
void check(const TransformerBlockParams& params);

// How much `transformer_block` needs; pointers are not looked at.
int64_t workspace_bytes(const TransformerBlockParams& params);

void transformer_block(const TransformerBlockParams& params, Products& products,
                       Stream stream = nullptr);

}  // namespace accelrt
