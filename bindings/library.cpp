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
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, Tensor(a!) out) -> ()");
  m.def("residual_blend(Tensor x, Tensor y, Tensor? alpha, float scale, Tensor(a!) out) -> ()");
  m.def(
      "guided_step(Tensor sample, Tensor cond, Tensor? uncond, Tensor? history, "
      "float guidance_scale, float sample_coef, float eps_coef, float history_coef, "
      "Tensor(a!) out, Tensor(b!)? eps_out) -> ()");
  m.def("feature_delta(Tensor a, Tensor b, int p, Tensor(a!) out) -> ()");
  m.def("weighted_sum(Tensor features, Tensor weights, Tensor? base, Tensor(a!) out) -> ()");
}
