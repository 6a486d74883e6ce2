#include "accelrt/cpu_isa.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "accelrt/check.h"
#include "accelrt/streaming.h"

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

int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    constexpr int64_t kMost = int64_t{32} << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    for (const int level : {_SC_LEVEL3_CACHE_SIZE, _SC_LEVEL2_CACHE_SIZE}) {
      const int64_t size = sysconf(level);
      if (size > 0) return std::min(size, kMost);
    }
#endif
    return kMost;
  }();
  return bytes;
}

}  // namespace accelrt
