#include "kernels/layer_norm/layer_norm.h"

#include "accelrt/backend.h"

namespace accelrt {
namespace {

// Checks the arguments of one operator against its x and turns them into Params fields.
class Arguments {
 public:
  Arguments(const char* op, const TensorView& x) : op_(op), x_(x) {
    ACCELRT_CHECK(x.ndim == 3, op, ": x has ", x.ndim, " dimensions, expected 3");
  }

  LayerNormParams::Rows rows(const char* name, const TensorView& t) const {
    check_same_type(op_, name, t, x_);
    check_same_shape(op_, name, t, x_);
    check_last_stride(name, t);
    return {t.data, t.stride[0], t.stride[1]};
  }

  LayerNormParams::PerSample per_sample(const char* name, const OptionalView& t) const {
    if (!t) return {};
    check_same_type(op_, name, *t, x_);
    ACCELRT_CHECK(t->ndim == 2 && t->size[0] == x_.size[0] && t->size[1] == x_.size[2], op_, ": ",
                  name, " is not of shape [", x_.size[0], ", ", x_.size[2], "]");
    check_last_stride(name, *t);
    return {t->data, t->stride[0]};
  }

  const void* vector(const char* name, const OptionalView& t) const {
    if (!t) return nullptr;
    check_same_type(op_, name, *t, x_);
    ACCELRT_CHECK(t->ndim == 1 && t->size[0] == x_.size[2], op_, ": ", name, " is not of shape [",
                  x_.size[2], "]");
    check_last_stride(name, *t);
    return t->data;
  }

 private:
  void check_last_stride(const char* name, const TensorView& t) const {
    if (t.numel() > 0) check_unit_stride(op_, name, t);
  }

  const char* op_;
  const TensorView& x_;
};

LayerNormParams base_params(const Arguments& arguments, const TensorView& x,
                            const OptionalView& weight, const OptionalView& bias,
                            const OptionalView& scale, const OptionalView& shift, double eps,
                            const TensorView& out) {
  LayerNormParams params;
  params.batch = x.size[0];
  params.rows = x.size[1];
  params.width = x.size[2];
  params.x = arguments.rows("x", x);
  params.out = arguments.rows("out", out);
  params.scale = arguments.per_sample("scale", scale);
  params.shift = arguments.per_sample("shift", shift);
  params.weight = arguments.vector("weight", weight);
  params.bias = arguments.vector("bias", bias);
  params.eps = static_cast<float>(eps);
  params.dtype = x.dtype;
  return params;
}

}  // namespace

void layer_norm_modulate(const TensorView& x, const OptionalView& weight, const OptionalView& bias,
                         const OptionalView& scale, const OptionalView& shift, double eps,
                         const TensorView& out, Stream stream) {
  const Arguments arguments("layer_norm_modulate", x);
  const LayerNormParams params = base_params(arguments, x, weight, bias, scale, shift, eps, out);
  if (x.numel() == 0) return;
  ACCELRT_RUN_BF16(x.device, layer_norm_cpu, launch_layer_norm, params, stream);
}

void gate_residual_layer_norm_modulate(const TensorView& x, const TensorView& residual,
                                       const OptionalView& gate, const OptionalView& weight,
                                       const OptionalView& bias, const OptionalView& scale,
                                       const OptionalView& shift, const OptionalView& inject,
                                       const OptionalView& inject_scale, double eps,
                                       const TensorView& out, const TensorView& residual_out,
                                       Stream stream) {
  const Arguments arguments("gate_residual_layer_norm_modulate", x);
  LayerNormParams params = base_params(arguments, x, weight, bias, scale, shift, eps, out);
  params.residual = arguments.rows("residual", residual);
  params.residual_out = arguments.rows("residual_out", residual_out);
  params.gate = arguments.per_sample("gate", gate);
  if (inject) params.inject = arguments.rows("inject", *inject);
  params.inject_scale = arguments.vector("inject_scale", inject_scale);
  if (x.numel() == 0) return;
  ACCELRT_RUN_BF16(x.device, layer_norm_cpu, launch_layer_norm, params, stream);
}

}  // namespace accelrt
