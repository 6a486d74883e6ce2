#include "blocks/feed_forward.h"

#include <cstdlib>
#include <memory>

#include "blocks/kernel_products.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kFeedForward("feed_forward", [](const Arguments& a) {
  FeedForwardParams p;
  p.x = a.tensor("x");
  p.layers.in = {a.tensor("in_weight"), a.optional("in_bias")};
  p.layers.out = {a.tensor("out_weight"), a.optional("out_bias")};
  p.layers.activation = static_cast<HiddenActivation>(a.integer("activation"));
  p.layers.rows = a.integer("rows");
  p.add = a.integer("add") != 0;
  p.gate = a.optional("gate");
  p.rows_per_sample = a.integer("rows_per_sample");
  p.out = a.tensor("out");
  p.scratch_bytes = feed_forward_scratch_bytes(p);
  // Of exactly this size, so that the sanitizer sees a step beyond it.
  const std::unique_ptr<void, void (*)(void*)> memory(
      std::aligned_alloc(64, static_cast<size_t>(p.scratch_bytes)), &std::free);
  p.scratch = memory.get();
  KernelProducts products;
  feed_forward(p, products);
});

}  // namespace
}  // namespace accelrt::sim
