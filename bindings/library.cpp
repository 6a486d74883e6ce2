// The schemas of all operators. Every one writes to `out` and returns nothing, so that one
// registration serves eager calls, out= calls and torch.compile.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(accelrt, m) {
  m.def("activation(Tensor x, Tensor? bias, int kind, Tensor(a!) out) -> ()");
  m.def("geglu(Tensor x, Tensor? bias, int kind, Tensor(a!) out) -> ()");
  m.def(
      "group_norm_stats(Tensor x, Tensor? x2, Tensor? add, int num_groups, int frames, "
      "bool accumulate, Tensor(a!) out) -> ()");
  m.def(
      "group_norm_apply(Tensor x, Tensor? x2, Tensor? add, Tensor stats, Tensor? weight, "
      "Tensor? bias, Tensor? scale, Tensor? shift, int num_groups, int frames, float eps, "
      "bool silu, Tensor(a!) out) -> ()");
  m.def(
      "layer_norm_modulate(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
      "float eps, Tensor(a!) out) -> ()");
  m.def(
      "gate_residual_layer_norm_modulate(Tensor x, Tensor residual, Tensor? gate, "
      "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? inject, "
      "Tensor? inject_scale, float eps, Tensor(a!) out, Tensor(b!) residual_out) -> ()");
  m.def(
      "temporal_attention(Tensor q, Tensor k, Tensor v, int num_heads, float scale, "
      "Tensor(a!) out) -> ()");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, int epilogue, Tensor? gate, "
      "int rows_per_sample, Tensor(a!) out) -> ()");
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, int stride_height, int stride_width, "
      "int padding_height, int padding_width, Tensor(a!) out) -> ()");
  m.def(
      "transformer_block(Tensor(a!) stream, Tensor modulation, Tensor? norm1_weight, "
      "Tensor? norm1_bias, float norm1_eps, Tensor? norm2_weight, Tensor? norm2_bias, "
      "float norm2_eps, Tensor q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, "
      "Tensor? v_weight, Tensor? v_bias, Tensor out_weight, Tensor? out_bias, int heads, "
      "float scale, Tensor? mask, int heads_per_slice, Tensor? cross_q_weight, Tensor? "
      "cross_q_bias, "
      "Tensor? cross_k_weight, Tensor? cross_k_bias, Tensor? cross_v_weight, "
      "Tensor? cross_v_bias, Tensor? cross_out_weight, Tensor? cross_out_bias, int cross_heads, "
      "float cross_scale, Tensor? cross_mask, Tensor? context, Tensor? keys, Tensor? values, "
      "Tensor ff_in_weight, Tensor? ff_in_bias, Tensor ff_out_weight, Tensor? ff_out_bias, "
      "int activation, int ff_rows, Tensor(b!) workspace) -> ()");
  m.def(
      "feed_forward(Tensor x, Tensor in_weight, Tensor? in_bias, Tensor out_weight, "
      "Tensor? out_bias, int activation, Tensor? gate, int rows_per_sample, bool add, "
      "Tensor(a!) out, Tensor(b!) scratch) -> ()");
  m.def("block_projection(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, Tensor(a!) out) -> ()");
  m.def("residual_blend(Tensor x, Tensor y, Tensor? alpha, float scale, Tensor(a!) out) -> ()");
  m.def(
      "guided_step(Tensor sample, Tensor cond, Tensor? uncond, Tensor? history, "
      "float guidance_scale, float sample_coef, float eps_coef, float history_coef, "
      "Tensor(a!) out, Tensor(b!)? eps_out) -> ()");
  m.def("feature_delta(Tensor a, Tensor b, int p, Tensor(a!) out) -> ()");
  m.def("weighted_sum(Tensor features, Tensor weights, Tensor? base, Tensor(a!) out) -> ()");
}
