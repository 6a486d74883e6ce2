#include "kernels/layer_norm/layer_norm.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kLayerNorm("layer_norm_modulate", [](const Arguments& a) {
  layer_norm_modulate(a.tensor("x"), a.optional("weight"), a.optional("bias"), a.optional("scale"),
                      a.optional("shift"), a.number("eps"), a.tensor("out"));
});

const Register kGateResidual("gate_residual_layer_norm_modulate", [](const Arguments& a) {
  gate_residual_layer_norm_modulate(
      a.tensor("x"), a.tensor("residual"), a.optional("gate"), a.optional("weight"),
      a.optional("bias"), a.optional("scale"), a.optional("shift"), a.optional("inject"),
      a.optional("inject_scale"), a.number("eps"), a.tensor("out"), a.tensor("residual_out"));
});

}  // namespace
}  // namespace accelrt::sim
