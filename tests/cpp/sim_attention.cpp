#include "kernels/attention/attention.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kAttention("attention", [](const Arguments& a) {
  attention(a.tensor("q"), a.tensor("k"), a.tensor("v"), a.optional("bias"), a.number("scale"),
            a.tensor("out"));
});

}  // namespace
}  // namespace accelrt::sim
