#include "kernels/linear/linear.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kLinear("linear", [](const Arguments& a) {
  linear(a.tensor("x"), a.tensor("weight"), a.optional("bias"),
         static_cast<LinearEpilogue>(a.integer("epilogue")), a.optional("gate"),
         a.integer("rows_per_sample"), a.tensor("out"));
});

}  // namespace
}  // namespace accelrt::sim
