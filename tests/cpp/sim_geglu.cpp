#include "kernels/geglu/geglu.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kGeglu("geglu", [](const Arguments& a) {
  geglu(a.tensor("x"), a.optional("bias"), static_cast<ActivationKind>(a.integer("kind")),
        a.tensor("out"));
});

}  // namespace
}  // namespace accelrt::sim
