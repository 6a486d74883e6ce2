// Who makes the matrix products and the attention of CUDA tensors: torch, or kernels of ours where
// they take a call.
#pragma once

#include <string>

namespace accelrt::bindings {

// As ACCELRT_CUDA_PRODUCTS says: `torch` (the default) or `own`. Throws if it says something else.
// What our kernels do not take is torch's either way.
bool own_cuda_products();

// Overrules the variable in this process (tests, benchmarks).
void set_cuda_products(const std::string& name);

}  // namespace accelrt::bindings
