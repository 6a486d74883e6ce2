#include "kernels/temporal_attention/temporal_attention.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kTemporalAttention("temporal_attention", [](const Arguments& a) {
  // "q" alone: out is q.
  const OptionalView out = a.optional("out");
  temporal_attention(a.tensor("q"), a.tensor("k"), a.tensor("v"), a.integer("num_heads"),
                     static_cast<float>(a.number("scale")), out ? *out : a.tensor("q"));
});

}  // namespace
}  // namespace accelrt::sim
