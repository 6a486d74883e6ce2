// The launchers of a build without nvcc, with the simulator in the place of a GPU: what they hand
// over, and nothing else, runs the kernel. Linked with the runners of the simulated operators
// (accelrt_launches <op> cuda ...), and `kernel_names`, which prints all kernels.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "accelrt/check.h"
#include "accelrt/kernel_launcher.h"
#include "sim_io.h"

extern "C" int accelrt_run_by_name(const char* kernel, const int64_t* grid, int threads,
                                   int64_t shared_bytes, const void* params, size_t params_bytes);

namespace accelrt::sim {
namespace {

void run(const KernelLaunch& launch) {
  std::printf("%s\t%s\t%s\t%lld %lld %lld\t%d\t%lld\t%zu\n", launch.op, launch.folder,
              launch.kernel, static_cast<long long>(launch.grid[0]),
              static_cast<long long>(launch.grid[1]), static_cast<long long>(launch.grid[2]),
              launch.threads, static_cast<long long>(launch.shared_bytes), launch.params_bytes);
  // The launcher's copy is all that the kernel has.
  const std::unique_ptr<std::byte[]> copy(new std::byte[launch.params_bytes]);
  std::memcpy(copy.get(), launch.params, launch.params_bytes);
  const int status = accelrt_run_by_name(launch.kernel, launch.grid, launch.threads,
                                         launch.shared_bytes, copy.get(), launch.params_bytes);
  ACCELRT_CHECK(status != 1, "the simulator has no kernel ", launch.kernel);
  ACCELRT_CHECK(status == 0, launch.kernel, " has parameters of another size");
}

const Register kNames("kernel_names", [](const Arguments&) {
  for (const KernelName& name : kernel_names()) {
    std::printf("%s\t%s\t%zu\n", name.folder, name.kernel, name.params_bytes);
  }
});

// ACCELRT_NO_LAUNCHER: as in a program that registers none.
const bool kRegistered = [] {
  if (std::getenv("ACCELRT_NO_LAUNCHER") == nullptr)
    set_kernel_launcher(&run, [](int) { return 2; });
  return true;
}();

}  // namespace
}  // namespace accelrt::sim
