// The whole block without torch: the orchestration and our products.
#include <cstdlib>
#include <memory>

#include "blocks/kernel_products.h"
#include "blocks/transformer_block.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

LinearWeights linear_of(const Arguments& a, const std::string& name) {
  return {a.tensor(name + "_weight"), a.optional(name + "_bias")};
}

AttentionWeights attention_of(const Arguments& a, const std::string& prefix) {
  AttentionWeights w;
  w.q = linear_of(a, prefix + "q");
  w.k = linear_of(a, prefix + "k");
  w.v = linear_of(a, prefix + "v");
  w.out = linear_of(a, prefix + "out");
  w.heads = a.integer("heads");
  w.scale = a.number("scale");
  w.mask = a.optional(prefix + "mask");
  return w;
}

const Register kBlock("transformer_block", [](const Arguments& a) {
  TransformerBlockParams p;
  p.stream = a.tensor("stream");
  p.modulation = a.tensor("modulation");
  p.attention = attention_of(a, "");
  if (a.optional("context")) p.cross = {attention_of(a, "cross_"), a.optional("context"), {}, {}};
  p.heads_per_slice = a.integer("heads_per_slice");
  p.feed_forward.in = linear_of(a, "ff_in");
  p.feed_forward.out = linear_of(a, "ff_out");
  p.feed_forward.activation = static_cast<HiddenActivation>(a.integer("activation"));
  p.feed_forward.rows = a.integer("ff_rows");
  p.workspace_bytes = workspace_bytes(p);
  // Of exactly this size, so that the sanitizer sees a step beyond it.
  const std::unique_ptr<void, void (*)(void*)> memory(
      std::aligned_alloc(64, static_cast<size_t>(p.workspace_bytes)), &std::free);
  p.workspace = memory.get();
  KernelProducts products;
  transformer_block(p, products);
});

}  // namespace
}  // namespace accelrt::sim
