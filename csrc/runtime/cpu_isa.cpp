#include "accelrt/cpu_isa.h"

#include <atomic>
#include <cstdlib>

#include "accelrt/check.h"

namespace accelrt {
namespace {

std::atomic<int> g_isa{-1};

Isa parse(const std::string& name) {
  for (const Isa isa : {Isa::kGeneric, Isa::kAVX2, Isa::kAVX512, Isa::kAVX512BF16}) {
    if (name == name_of(isa)) {
      ACCELRT_CHECK(isa <= best_isa(), "ACCELRT_CPU_ISA=", name,
                    ": this processor or build has at most ", name_of(best_isa()));
      return isa;
    }
  }
  ACCELRT_CHECK(false, "ACCELRT_CPU_ISA is '", name,
                "'; allowed: generic, avx2, avx512, avx512bf16");
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kGeneric: return "generic";
    case Isa::kAVX2: return "avx2";
    case Isa::kAVX512: return "avx512";
    case Isa::kAVX512BF16: return "avx512bf16";
  }
  return "unknown";
}

Isa best_isa() {
#if defined(ACCELRT_HAVE_X86_ISA)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAVX512BF16 : Isa::kAVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAVX2;
#endif
  return Isa::kGeneric;
}

Isa active_isa() {
  const int current = g_isa.load(std::memory_order_relaxed);
  if (current >= 0) return static_cast<Isa>(current);
  const char* asked = std::getenv("ACCELRT_CPU_ISA");
  const Isa isa = asked == nullptr || *asked == '\0' ? best_isa() : parse(asked);
  g_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
  return isa;
}

void set_isa(const std::string& name) {
  g_isa.store(static_cast<int>(parse(name)), std::memory_order_relaxed);
}

}  // namespace accelrt
