// Run-time choice of the CPU instruction set. Every <op>_cpu.cpp is compiled once per
// instruction set, in a namespace of that name; avx512bf16 alone only for the operators whose
// matrix products gain by it (ACCELRT_BF16_OPS in CMakeLists.txt). The others run their avx512
// kernels there: the conversion instructions of AVX512-BF16 flush subnormals, theirs do not.
#pragma once

#include <string>

namespace accelrt {

enum class Isa : int { kGeneric = 0, kAVX2 = 1, kAVX512 = 2, kAVX512BF16 = 3 };

const char* name_of(Isa isa);

// The best instruction set that this processor and this build have.
Isa best_isa();

// The one in use: the best, or what ACCELRT_CPU_ISA (generic, avx2, avx512, avx512bf16)
// asks for.
// Throws if the variable names an unknown or unsupported one.
Isa active_isa();

// Forces an instruction set in this process (tests, benchmarks).
void set_isa(const std::string& name);

}  // namespace accelrt

#if defined(ACCELRT_NO_CPU_KERNELS)
// A simulator build that holds the CUDA sources alone.
#define ACCELRT_DECLARE_CPU(name, Params)
#define ACCELRT_DECLARE_CPU_BF16(name, Params)
#define ACCELRT_CALL_CPU(name, params) ACCELRT_CHECK(false, #name ": this build has no CPU kernels")
#define ACCELRT_CALL_CPU_BF16(name, params) ACCELRT_CALL_CPU(name, params)
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
#define ACCELRT_DECLARE_CPU_BF16(name, Params) \
  namespace avx512bf16 {                       \
  void name(const Params&);                    \
  }
#define ACCELRT_CALL_CPU(name, params)                             \
  do {                                                             \
    switch (::accelrt::active_isa()) {                             \
      case ::accelrt::Isa::kAVX512BF16:                            \
      case ::accelrt::Isa::kAVX512: avx512::name(params); break;   \
      case ::accelrt::Isa::kAVX2: avx2::name(params); break;       \
      case ::accelrt::Isa::kGeneric: generic::name(params); break; \
    }                                                              \
  } while (0)
// For an operator that was declared with ACCELRT_DECLARE_CPU_BF16 too.
#define ACCELRT_CALL_CPU_BF16(name, params)                       \
  do {                                                            \
    if (::accelrt::active_isa() == ::accelrt::Isa::kAVX512BF16) { \
      avx512bf16::name(params);                                   \
    } else {                                                      \
      ACCELRT_CALL_CPU(name, params);                             \
    }                                                             \
  } while (0)
#else
#define ACCELRT_DECLARE_CPU(name, Params) \
  namespace generic {                     \
  void name(const Params&);               \
  }
#define ACCELRT_DECLARE_CPU_BF16(name, Params)
#define ACCELRT_CALL_CPU(name, params) generic::name(params)
#define ACCELRT_CALL_CPU_BF16(name, params) generic::name(params)
#endif
