#include <vector>

#include "kernels/feature_delta/feature_delta.h"
#include "kernels/guided_step/guided_step.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

float number(const Arguments& a, const char* name) { return static_cast<float>(a.number(name)); }

const Register kGuidedStep("guided_step", [](const Arguments& a) {
  guided_step(a.tensor("sample"), a.tensor("cond"), a.optional("uncond"), a.optional("history"),
              number(a, "guidance_scale"), number(a, "sample_coef"), number(a, "eps_coef"),
              number(a, "history_coef"), a.tensor("out"), a.optional("eps_out"));
});

const Register kFeatureDelta("feature_delta", [](const Arguments& a) {
  const TensorView x = a.tensor("a");
  std::vector<float> storage(static_cast<size_t>(feature_delta_workspace(x)));
  TensorView workspace;
  workspace.data = storage.data();
  workspace.device = x.device;
  workspace.ndim = 1;
  workspace.size[0] = static_cast<int64_t>(storage.size());
  workspace.stride[0] = 1;
  feature_delta(x, a.tensor("b"), static_cast<int>(a.integer("p")), workspace, a.tensor("out"));
});

}  // namespace
}  // namespace accelrt::sim
