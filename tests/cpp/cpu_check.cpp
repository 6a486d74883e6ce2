// accelrt_cpu_check <attention|conv2d|linear|norms|temporal_attention>
// accelrt_cpu_check fault <number>
//
// The CPU kernels as compiled for AVX2, AVX-512 and AVX512-BF16, and those on emulated tiles, under
// AddressSanitizer and UndefinedBehaviorSanitizer, at sizes beside every block, vector and pair,
// against sums in double precision; in guarded memory (guarded.h). New memory holds NaN, so that
// what a kernel reads of its scratch before writing it shows in the result. Prints the instruction
// sets that have run; the exit status is 0 if all is well. A fault is what the second form commits,
// so that a test can see it reported.
#include "cpu_check.h"

#include <sanitizer/common_interface_defs.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>

extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "malloc_fill_byte=255:max_malloc_fill_size=1073741824";
}

namespace accelrt::guarded {
namespace {

std::string g_case;

void print_case() { std::fprintf(stderr, "in: %s\n", g_case.c_str()); }

struct Copy {
  const float* from;
  float* to;
  int64_t from_gap, to_gap;
};

// Copies two rows of five elements, and does something wrong.
void faulty_copy(const Copy& copy, int fault) {
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t i = 0; i < 5; ++i) {
      copy.to[row * (5 + copy.to_gap) + i] = copy.from[row * (5 + copy.from_gap) + i];
    }
  }
  const volatile float* const from = copy.from;
  volatile float* const to = copy.to;
  const std::unique_ptr<float[]> scratch(new float[1000]);
  switch (fault) {
    case 0: return;
    case 1: static_cast<void>(from[10 + copy.from_gap]); return;
    case 2: static_cast<void>(from[-1]); return;
    case 3: const_cast<volatile float*>(from)[0] = 1.f; return;
    case 4: to[5] = 1.f; return;                   // between the rows
    case 5: to[-1] = 1.f; return;                  // beside them
    case 6: to[0] = scratch[999]; return;          // which nobody wrote
    case 7: to[0] = to[3] + 1.f / 1024.f; return;  // a wrong result
    default: ACCELRT_CHECK(false, "no fault ", fault);
  }
}

void commit(int fault) {
  const Values values = eighths(10);
  for (const Side side : {Side::kBegin, Side::kEnd}) {
    set_case(side == Side::kBegin ? "a copy at the beginning" : "a copy at the end");
    const Input from(DType::kFloat32, side, {{2, 3}, {5}}, values);
    const Tensor to(DType::kFloat32, side, {{2, 1}, {5}});
    faulty_copy({static_cast<const float*>(from.data()), static_cast<float*>(to.data()), 3, 1},
                fault);
    to.check(values);
  }
}

void check(const std::string& what) {
  if (what == "attention") return check_attention();
  if (what == "conv2d") return check_conv2d();
  if (what == "linear") return check_linear();
  if (what == "norms") return check_norms();
  if (what == "temporal_attention") return check_temporal_attention();
  ACCELRT_CHECK(false, "'", what,
                "' is none of attention, conv2d, linear, norms, temporal_attention");
}

}  // namespace

void set_case(const std::string& text) { g_case = text; }

}  // namespace accelrt::guarded

int main(int argc, char** argv) {
  using namespace accelrt;
  __sanitizer_set_death_callback(guarded::print_case);
  try {
    if (argc == 3 && std::strcmp(argv[1], "fault") == 0) {
      guarded::commit(std::atoi(argv[2]));
    } else {
      guarded::check(argc == 2 ? argv[1] : "");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    guarded::print_case();
    return 1;
  }
  std::puts(guarded::ran().c_str());
  return 0;
}
