// Softmax attention by stride, without a matrix of scores.
// q, out: [B, S, H, D]; k, v: [B, L, H, D]; bias, added to the scaled scores: [B or 1, H or 1,
// S or 1, L]. The last stride is 1, the others are free. D <= 256, L >= 1. out may be q.
// A row whose bias is -inf throughout gives zeros. The CUDA kernel takes what
// attention_cuda_takes() says; the bindings prefer the library's (ACCELRT_CUDA_PRODUCTS), and give
// it the rest.
#pragma once

#include "accelrt/cpu_isa.h"
#include "accelrt/tensor_view.h"

namespace accelrt {

constexpr int kMaxAttentionDim = 256;

// Strides of a [batch, tokens, heads, channels] tensor, in elements.
struct TokenStrides {
  int64_t batch = 0;
  int64_t token = 0;
  int64_t head = 0;
};

struct AttentionParams {
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  const void* bias = nullptr;
  void* out = nullptr;
  TokenStrides q_stride;
  TokenStrides k_stride;
  TokenStrides v_stride;
  TokenStrides bias_stride;  // of batches, queries and heads; 0 where they share it
  TokenStrides out_stride;
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t queries = 0;
  int64_t keys = 0;
  int head_dim = 0;
  double scale = 1.0;
  DType dtype = DType::kFloat32;
};

// Throws unless the tensors are as above.
void check_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                     const OptionalView& bias, const TensorView& out);

// Of checked tensors.
AttentionParams attention_params(const TensorView& q, const TensorView& k, const TensorView& v,
                                 const OptionalView& bias, double scale, const TensorView& out);

// 16-bit elements, D a multiple of 8, and q, k, v and out aligned to 16 bytes: their pointers, and
// the strides of dimensions longer than one. The bias may lie anywhere.
bool attention_cuda_takes(const AttentionParams& params);

// On the CPU the scratch of a thread is allocated within and is below 512 KiB whatever the sizes;
// on CUDA there is none, and what attention_cuda_takes() declines throws.
void attention(const TensorView& q, const TensorView& k, const TensorView& v,
               const OptionalView& bias, double scale, const TensorView& out,
               Stream stream = nullptr);

ACCELRT_DECLARE_CPU(attention_cpu, AttentionParams)
ACCELRT_DECLARE_CPU_BF16(attention_cpu, AttentionParams)
ACCELRT_DECLARE_CPU_TILES(attention_cpu, AttentionParams)
void launch_attention(const AttentionParams& params, Stream stream);

}  // namespace accelrt
