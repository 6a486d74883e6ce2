#pragma once

#include <pybind11/pybind11.h>

namespace accelrt::bindings {

// Adds set_kernel_launcher, launch_kernel and kernel_names to the module.
void bind_kernel_launcher(pybind11::module_& m);

}  // namespace accelrt::bindings
