#include "accelrt/kernel_launcher.h"

#include <atomic>

#include "accelrt/check.h"

namespace accelrt {
namespace {

std::atomic<KernelLauncher> g_launcher{nullptr};
std::atomic<DeviceAttribute> g_attribute{nullptr};

// Within a function: lists of other translation units grow it before main.
std::vector<KernelName>& listed() {
  static std::vector<KernelName> names;
  return names;
}

}  // namespace

void set_kernel_launcher(KernelLauncher launcher, DeviceAttribute attribute) {
  g_launcher.store(launcher);
  g_attribute.store(attribute);
}

void launch_kernel(const KernelLaunch& launch) {
  const KernelLauncher launcher = g_launcher.load();
  ACCELRT_CHECK(launcher != nullptr, launch.op,
                ": this build has no machine code of CUDA kernels, and no kernel launcher is "
                "registered (accelrt::set_kernel_launcher)");
  launcher(launch);
}

int device_attribute(int attribute) {
  const DeviceAttribute ask = g_attribute.load();
  ACCELRT_CHECK(ask != nullptr, "attribute ", attribute,
                " of the device: no kernel launcher is registered (accelrt::set_kernel_launcher)");
  return ask(attribute);
}

const std::vector<KernelName>& kernel_names() { return listed(); }

namespace detail {

bool list_kernel(const KernelName& name) {
  listed().push_back(name);
  return true;
}

}  // namespace detail
}  // namespace accelrt
