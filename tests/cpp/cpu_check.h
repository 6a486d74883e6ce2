// The parts of accelrt_cpu_check, one per operator.
#pragma once

#include <sstream>
#include <string>

#include "accelrt/check.h"
#include "guarded.h"

// The forms of a kernel that are checked. At the level of AVX-512 the arithmetic of bfloat16 is
// that of float16, and all else is as at AVX512-BF16: it is left to the kernels with the most code.
#define ACCELRT_FORM(isa, level, name) {Isa::isa, level::name}
#define ACCELRT_FORMS(name) \
  {ACCELRT_FORM(kAVX2, avx2, name), ACCELRT_FORM(kAVX512BF16, avx512bf16, name)}
#define ACCELRT_TILES_ALONE(name) {ACCELRT_FORM(kAMXEmulated, amx_emulated, name)}
#define ACCELRT_FORMS_WITH_TILES(name)                                   \
  {ACCELRT_FORM(kAVX2, avx2, name), ACCELRT_FORM(kAVX512, avx512, name), \
   ACCELRT_FORM(kAVX512BF16, avx512bf16, name), ACCELRT_FORM(kAMXEmulated, amx_emulated, name)}

namespace accelrt::guarded {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// What is reported if the program ends here.
void set_case(const std::string& text);

// What is allowed of a result of an activation or a softmax, whose own rounding is of this size.
inline float rounding(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-5f : dtype == DType::kFloat16 ? 1e-3f : 1e-2f;
}

void check_attention();
void check_conv2d();
void check_linear();
void check_norms();
void check_temporal_attention();

}  // namespace accelrt::guarded
