#include "host_sim.h"

int accelrt_run_by_name(const char* kernel, const int64_t* grid, int threads, int64_t shared_bytes,
                        const void* params, size_t params_bytes) {
  const auto at = host_sim::named_kernels().find(kernel);
  if (at == host_sim::named_kernels().end()) return 1;
  if (at->second.params_bytes != params_bytes) return 2;
  at->second.run(dim3(grid[0], grid[1], grid[2]), threads, shared_bytes, params);
  return 0;
}
