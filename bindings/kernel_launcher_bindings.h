#pragma once

#include <pybind11/pybind11.h>

namespace accelrt::bindings {

// Adds what kernel_launcher.h has to the module.
void bind_kernel_launcher(pybind11::module_& m);

}  // namespace accelrt::bindings
