#include "kernels/activation/activation.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kActivation("activation", [](const Arguments& a) {
  activation(a.tensor("x"), a.optional("bias"), static_cast<ActivationKind>(a.integer("kind")),
             a.tensor("out"));
});

}  // namespace
}  // namespace accelrt::sim
