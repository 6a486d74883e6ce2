// Errors: thrown with the source position and the offending value.
#pragma once

#if defined(__CUDACC_RTC__)
// Checks are the launchers' work: kernels compiled at run time have none.
#define ACCELRT_CHECK(condition, ...) static_cast<void>(sizeof(!(condition)))
#else

#include <sstream>
#include <stdexcept>
#include <string>

namespace accelrt {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

template <typename... Args>
[[noreturn]] void fail(const char* file, int line, const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  const std::string path(file);
  const auto slash = path.rfind('/');
  message << " [" << (slash == std::string::npos ? path : path.substr(slash + 1)) << ":" << line
          << "]";
  throw Error(message.str());
}

}  // namespace detail
}  // namespace accelrt

#define ACCELRT_CHECK(condition, ...)                                               \
  do {                                                                              \
    if (!(condition)) { ::accelrt::detail::fail(__FILE__, __LINE__, __VA_ARGS__); } \
  } while (0)

#endif
