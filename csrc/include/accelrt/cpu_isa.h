// Run-time choice of the CPU instruction set. Every <op>_cpu.cpp is compiled once per
// instruction set, in a namespace of that name.
#pragma once

#include <string>

namespace accelrt {

enum class Isa : int { kGeneric = 0, kAVX2 = 1, kAVX512 = 2 };

const char* name_of(Isa isa);

// The best instruction set that this processor and this build have.
Isa best_isa();

// The one in use: the best, or what ACCELRT_CPU_ISA (generic, avx2, avx512) asks for.
// Throws if the variable names an unknown or unsupported one.
Isa active_isa();

// Forces an instruction set in this process (tests, benchmarks).
void set_isa(const std::string& name);

}  // namespace accelrt

#if defined(ACCELRT_NO_CPU_KERNELS)
// A simulator build that holds the CUDA sources alone.
#define ACCELRT_DECLARE_CPU(name, Params)
#define ACCELRT_CALL_CPU(name, params) ACCELRT_CHECK(false, #name ": this build has no CPU kernels")
#elif defined(ACCELRT_HAVE_X86_ISA)
#define ACCELRT_DECLARE_CPU(name, Params) \
  namespace generic {                     \
  void name(const Params&);               \
  }                                       \
  namespace avx2 {                        \
  void name(const Params&);               \
  }                                       \
  namespace avx512 {                      \
  void name(const Params&);               \
  }
#define ACCELRT_CALL_CPU(name, params)                             \
  do {                                                             \
    switch (::accelrt::active_isa()) {                             \
      case ::accelrt::Isa::kAVX512: avx512::name(params); break;   \
      case ::accelrt::Isa::kAVX2: avx2::name(params); break;       \
      case ::accelrt::Isa::kGeneric: generic::name(params); break; \
    }                                                              \
  } while (0)
#else
#define ACCELRT_DECLARE_CPU(name, Params) \
  namespace generic {                     \
  void name(const Params&);               \
  }
#define ACCELRT_CALL_CPU(name, params) generic::name(params)
#endif
