// Run-time choice of the CPU instruction set. Every <op>_cpu.cpp is compiled once per
// instruction set, in a namespace of that name; avx512bf16 alone only for the operators whose
// matrix products or roundings gain by it (ACCELRT_BF16_OPS in CMakeLists.txt). The others run
// their avx512 kernels there. The instructions of AVX512-BF16 take subnormals for zeros.
//
// Some of these have an <op>_tiles.cpp for bfloat16 on the tile registers of AMX, compiled
// with the instructions (amx) and with their emulation (amx_emulated). What else is called at
// these two levels runs as at avx512bf16.
#pragma once

#include <string>

#include "accelrt/types.h"

namespace accelrt {

enum class Isa : int {
  kGeneric = 0,
  kAVX2 = 1,
  kAVX512 = 2,
  kAVX512BF16 = 3,
  kAMXEmulated = 4,  // to test the kernels on tiles; slow
  kAMX = 5,
};

const char* name_of(Isa isa);

// The best instruction set that this processor, its operating system and this build have; never
// the emulated one. The first call asks the system for the tile registers on behalf of the process.
Isa best_isa();

// The one in use: the best, or what ACCELRT_CPU_ISA (generic, avx2, avx512, avx512bf16,
// amx_emulated, amx) asks for.
// Throws if the variable names an unknown or unsupported one.
Isa active_isa();

// Forces an instruction set in this process (tests, benchmarks).
void set_isa(const std::string& name);

}  // namespace accelrt

#if defined(ACCELRT_NO_CPU_KERNELS)
// A simulator build that holds the CUDA sources alone.
#define ACCELRT_DECLARE_CPU(name, Params)
#define ACCELRT_DECLARE_CPU_BF16(name, Params)
#define ACCELRT_DECLARE_CPU_TILES(name, Params)
#define ACCELRT_CALL_CPU(name, params) ACCELRT_CHECK(false, #name ": this build has no CPU kernels")
#define ACCELRT_CALL_CPU_BF16(name, params) ACCELRT_CALL_CPU(name, params)
#define ACCELRT_CALL_CPU_TILES(name, params) ACCELRT_CALL_CPU(name, params)
#elif defined(ACCELRT_HAVE_X86_ISA)
#define ACCELRT_DECLARE_CPU_IN(isa, name, Params) \
  namespace isa {                                 \
  void name(const Params&);                       \
  }
#define ACCELRT_DECLARE_CPU(name, Params)       \
  ACCELRT_DECLARE_CPU_IN(generic, name, Params) \
  ACCELRT_DECLARE_CPU_IN(avx2, name, Params)    \
  ACCELRT_DECLARE_CPU_IN(avx512, name, Params)
#define ACCELRT_DECLARE_CPU_BF16(name, Params) ACCELRT_DECLARE_CPU_IN(avx512bf16, name, Params)
#define ACCELRT_DECLARE_CPU_TILES(name, Params)      \
  ACCELRT_DECLARE_CPU_IN(amx_emulated, name, Params) \
  ACCELRT_DECLARE_CPU_IN(amx, name, Params)
#define ACCELRT_CALL_CPU(name, params)                             \
  do {                                                             \
    switch (::accelrt::active_isa()) {                             \
      case ::accelrt::Isa::kAMX:                                   \
      case ::accelrt::Isa::kAMXEmulated:                           \
      case ::accelrt::Isa::kAVX512BF16:                            \
      case ::accelrt::Isa::kAVX512: avx512::name(params); break;   \
      case ::accelrt::Isa::kAVX2: avx2::name(params); break;       \
      case ::accelrt::Isa::kGeneric: generic::name(params); break; \
    }                                                              \
  } while (0)
// For an operator that was declared with ACCELRT_DECLARE_CPU_BF16 too.
#define ACCELRT_CALL_CPU_BF16(name, params)                       \
  do {                                                            \
    if (::accelrt::active_isa() >= ::accelrt::Isa::kAVX512BF16) { \
      avx512bf16::name(params);                                   \
    } else {                                                      \
      ACCELRT_CALL_CPU(name, params);                             \
    }                                                             \
  } while (0)
// For one that was also declared with ACCELRT_DECLARE_CPU_TILES.
#define ACCELRT_CALL_CPU_TILES(name, params)                          \
  do {                                                                \
    const ::accelrt::Isa isa = ::accelrt::active_isa();               \
    const bool tiles = (params).dtype == ::accelrt::DType::kBFloat16; \
    if (tiles && isa == ::accelrt::Isa::kAMX) {                       \
      amx::name(params);                                              \
    } else if (tiles && isa == ::accelrt::Isa::kAMXEmulated) {        \
      amx_emulated::name(params);                                     \
    } else {                                                          \
      ACCELRT_CALL_CPU_BF16(name, params);                            \
    }                                                                 \
  } while (0)
#else
#define ACCELRT_DECLARE_CPU(name, Params) \
  namespace generic {                     \
  void name(const Params&);               \
  }
#define ACCELRT_DECLARE_CPU_BF16(name, Params)
#define ACCELRT_DECLARE_CPU_TILES(name, Params)
#define ACCELRT_CALL_CPU(name, params) generic::name(params)
#define ACCELRT_CALL_CPU_BF16(name, params) generic::name(params)
#define ACCELRT_CALL_CPU_TILES(name, params) generic::name(params)
#endif
