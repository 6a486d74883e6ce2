#include "kernels/attention/attention.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kAttention("attention", [](const Arguments& a) {
  // "q" alone: out is q.
  const OptionalView out = a.optional("out");
  attention(a.tensor("q"), a.tensor("k"), a.tensor("v"), a.optional("bias"), a.number("scale"),
            out ? *out : a.tensor("q"));
});

}  // namespace
}  // namespace accelrt::sim
