#include "accelrt/cpu_isa.h"

#include <unistd.h>

#if defined(ACCELRT_HAVE_X86_ISA)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "accelrt/check.h"
#include "accelrt/streaming.h"

namespace accelrt {
namespace {

std::atomic<int> g_isa{-1};

constexpr Isa kAll[] = {Isa::kGeneric,    Isa::kAVX2,        Isa::kAVX512,
                        Isa::kAVX512BF16, Isa::kAMXEmulated, Isa::kAMX};

Isa parse(const std::string& name) {
  std::string names;
  for (const Isa isa : kAll) {
    if (name == name_of(isa)) {
      const Isa best = best_isa();
      // Its code, bar the tiles, is that of avx512bf16.
      const Isa needed = isa == Isa::kAMXEmulated ? Isa::kAVX512BF16 : isa;
      ACCELRT_CHECK(needed <= best, "ACCELRT_CPU_ISA=", name,
                    ": this processor or build has at most ", name_of(best));
      return isa;
    }
    names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
  }
  ACCELRT_CHECK(false, "ACCELRT_CPU_ISA is '", name, "'; allowed: ", names);
}

#if defined(ACCELRT_HAVE_X86_ISA)
// By hand, since __builtin_cpu_supports of g++ 12 does not know AMX.
bool processor_has_bfloat16_tiles() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  constexpr unsigned kBFloat16 = 1u << 22;
  constexpr unsigned kTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kTile) == 0 || (d & kBFloat16) == 0) return false;
  constexpr unsigned kOSXSAVE = 1u << 27;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOSXSAVE) == 0) return false;
  // The state components that the system has enabled; 17 and 18 are those of the tiles.
  uint32_t low = 0;
  uint32_t high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kTileState = 3u << 17;
  return (low & kTileState) == kTileState;
}

// Linux saves the registers of a process only after it has asked for it, once for all its threads.
bool system_grants_tiles() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}

Isa find_best() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAVX512;
    return processor_has_bfloat16_tiles() && system_grants_tiles() ? Isa::kAMX : Isa::kAVX512BF16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAVX2;
  return Isa::kGeneric;
}
#else
Isa find_best() { return Isa::kGeneric; }
#endif

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kGeneric: return "generic";
    case Isa::kAVX2: return "avx2";
    case Isa::kAVX512: return "avx512";
    case Isa::kAVX512BF16: return "avx512bf16";
    case Isa::kAMXEmulated: return "amx_emulated";
    case Isa::kAMX: return "amx";
  }
  return "unknown";
}

Isa best_isa() {
  static const Isa best = find_best();
  return best;
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
