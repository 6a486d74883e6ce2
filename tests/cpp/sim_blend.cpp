#include "kernels/residual_blend/residual_blend.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kResidualBlend("residual_blend", [](const Arguments& a) {
  // Without "out": in place.
  const OptionalView out = a.optional("out");
  residual_blend(a.tensor("x"), a.tensor("y"), a.optional("alpha"),
                 static_cast<float>(a.number("scale")), out ? *out : a.tensor("x"));
});

}  // namespace
}  // namespace accelrt::sim
