#include "kernels/weighted_sum/weighted_sum.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kWeightedSum("weighted_sum", [](const Arguments& a) {
  weighted_sum(a.tensor("features"), a.tensor("weights"), a.optional("base"), a.tensor("out"));
});

}  // namespace
}  // namespace accelrt::sim
