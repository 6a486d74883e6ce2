#include <memory>

#include "kernels/group_norm_apply/group_norm_apply.h"
#include "kernels/group_norm_stats/group_norm_stats.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kStats("group_norm_stats", [](const Arguments& a) {
  const TensorView x = a.tensor("x");
  const OptionalView x2 = a.optional("x2");
  const int64_t groups = a.integer("num_groups");
  const int64_t frames = a.integer("frames");
  TensorView workspace;
  workspace.device = x.device;
  workspace.ndim = 1;
  workspace.stride[0] = 1;
  workspace.size[0] = group_norm_stats_workspace(x, x2, groups, frames);
  // Exactly sized, so that AddressSanitizer sees every overrun.
  const std::unique_ptr<float[]> floats(new float[workspace.size[0]]);
  workspace.data = floats.get();
  group_norm_stats(x, x2, a.optional("add"), groups, frames, a.integer("accumulate") != 0,
                   a.tensor("out"), workspace);
});

const Register kApply("group_norm_apply", [](const Arguments& a) {
  group_norm_apply(a.tensor("x"), a.optional("x2"), a.optional("add"), a.tensor("stats"),
                   a.optional("weight"), a.optional("bias"), a.optional("scale"),
                   a.optional("shift"), a.integer("num_groups"), a.integer("frames"),
                   a.number("eps"), a.integer("silu") != 0, a.tensor("out"));
});

}  // namespace
}  // namespace accelrt::sim
