#include "products_choice.h"

#include <atomic>
#include <cstdlib>

#include "accelrt/check.h"

namespace accelrt::bindings {
namespace {

enum Choice : int { kUnknown, kTorch, kOwn };

std::atomic<int> g_choice{kUnknown};

Choice parse(const std::string& name) {
  if (name == "torch") return kTorch;
  ACCELRT_CHECK(name == "own", "ACCELRT_CUDA_PRODUCTS is '", name, "'; allowed: torch, own");
  return kOwn;
}

}  // namespace

bool own_cuda_products() {
  int choice = g_choice.load(std::memory_order_relaxed);
  if (choice == kUnknown) {
    const char* asked = std::getenv("ACCELRT_CUDA_PRODUCTS");
    choice = asked == nullptr || *asked == '\0' ? kTorch : parse(asked);
    g_choice.store(choice, std::memory_order_relaxed);
  }
  return choice == kOwn;
}

void set_cuda_products(const std::string& name) {
  g_choice.store(parse(name), std::memory_order_relaxed);
}

}  // namespace accelrt::bindings
