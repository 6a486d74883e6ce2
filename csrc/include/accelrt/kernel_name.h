// The name of a kernel that is a template argument, as the compiler writes it.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

namespace accelrt {
namespace detail {

// g++: "... [with auto kKernel = NAME]", clang: "... [kKernel = &NAME]". (Of a std::string_view
// here g++ would explain what it stands for, behind the name.)
template <auto kKernel>
constexpr const char* signature() {
  return __PRETTY_FUNCTION__;
}

template <auto kKernel>
constexpr std::string_view kernel_text() {
  std::string_view text = signature<kKernel>();
  constexpr std::string_view kBefore = "kKernel = ";
  text.remove_prefix(text.find(kBefore) + kBefore.size());
  text.remove_suffix(1);
  if (text.front() == '&') text.remove_prefix(1);
  return text;
}

template <auto kKernel>
constexpr auto kernel_characters() {
  constexpr std::string_view kText = kernel_text<kKernel>();
  std::array<char, kText.size() + 1> characters{};
  for (size_t i = 0; i < kText.size(); ++i) characters[i] = kText[i];
  return characters;
}

template <auto kKernel>
inline constexpr auto kKernelCharacters = kernel_characters<kKernel>();

}  // namespace detail

// E.g. "accelrt::geglu_kernel<GegluTraits<bfloat16, 8, accelrt::ActivationKind::kGELU> >": to be
// read inside namespace accelrt, since g++ leaves out the namespace of the kernel's arguments.
template <auto kKernel>
constexpr const char* kernel_name() {
  return detail::kKernelCharacters<kKernel>.data();
}

}  // namespace accelrt
