#pragma once

#include <pybind11/pybind11.h>

namespace accelrt::bindings {

// Adds OffsetPlan, plan_offsets and Arena to the module.
void bind_memory(pybind11::module_& m);

}  // namespace accelrt::bindings
