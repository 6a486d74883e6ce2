#include "guarded.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "accelrt/check.h"
#include "accelrt/parallel.h"

namespace accelrt::guarded {
namespace {

constexpr unsigned char kUnused = 0xff;

const int64_t g_page = sysconf(_SC_PAGESIZE);
std::mt19937 g_random(7);
std::vector<Isa> g_ran;

void put(DType dtype, float value, unsigned char* to) {
  const auto bits = [&](auto converted) { std::memcpy(to, &converted, sizeof(converted)); };
  switch (dtype) {
    case DType::kFloat32: return bits(value);
    case DType::kBFloat16: return bits(from_float<bfloat16>(value));
    case DType::kFloat16: return bits(from_float<float16>(value));
  }
}

float get(DType dtype, const unsigned char* from) {
  const auto value = [&](auto element) {
    std::memcpy(&element, from, sizeof(element));
    return to_float(element);
  };
  switch (dtype) {
    case DType::kFloat32: return value(float{});
    case DType::kBFloat16: return value(bfloat16{});
    case DType::kFloat16: return value(float16{});
  }
  return NAN;
}

void whole(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  body(begin, end, context);
}

// Of one, two and three indices by turns, whatever the grain.
void in_pieces(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  for (int64_t turn = 0; end > begin; ++turn) {
    const int64_t from = std::max(begin, end - 1 - turn % 3);
    body(from, end, context);
    end = from;
  }
}

}  // namespace

Values eighths(int64_t count) {
  Values values(static_cast<size_t>(count));
  for (float& x : values) x = static_cast<float>(static_cast<int>(g_random() % 17) - 8) / 8.f;
  return values;
}

Tensor::Tensor(DType dtype, Side side, const std::vector<Axis>& axes)
    : dtype_(dtype), stride_(axes.size()) {
  for (const Axis& axis : axes) size_.push_back(axis.size);
  int64_t step = 1;
  for (size_t d = axes.size(); d-- > 0;) {
    const Axis& axis = axes[d];
    stride_[d] = step + axis.gap;
    elements_ += (axis.size - 1) * stride_[d];
    step = stride_[d] * axis.size;
  }
  if (std::count(size_.begin(), size_.end(), 0) > 0) elements_ = 0;
  const int64_t bytes = elements_ * size_of(dtype);
  room_ = std::max<int64_t>((bytes + g_page - 1) / g_page, 1) * g_page;
  void* const pages = mmap(nullptr, static_cast<size_t>(room_ + 2 * g_page), PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ACCELRT_CHECK(pages != MAP_FAILED, "mmap of ", room_, " bytes");
  room_begin_ = static_cast<unsigned char*>(pages) + g_page;
  ACCELRT_CHECK(mprotect(room_begin_, static_cast<size_t>(room_), PROT_READ | PROT_WRITE) == 0,
                "mprotect");
  std::memset(room_begin_, kUnused, static_cast<size_t>(room_));
  data_ = side == Side::kBegin ? room_begin_ : room_begin_ + room_ - bytes;
}

Tensor::~Tensor() { munmap(room_begin_ - g_page, static_cast<size_t>(room_ + 2 * g_page)); }

// fn(index in order, offset in elements) of every element.
template <typename Fn>
void Tensor::each(const Fn& fn) const {
  if (elements_ == 0) return;
  std::vector<int64_t> at(size_.size(), 0);
  int64_t offset = 0;
  for (int64_t i = 0;; ++i) {
    fn(i, offset);
    size_t d = size_.size();
    while (d-- > 0) {
      offset += stride_[d];
      if (++at[d] < size_[d]) break;
      offset -= at[d] * stride_[d];
      at[d] = 0;
    }
    if (d == static_cast<size_t>(-1)) return;
  }
}

void Tensor::set(const Values& values) {
  each([&](int64_t i, int64_t offset) {
    put(dtype_, values.at(static_cast<size_t>(i)), data_ + offset * size_of(dtype_));
  });
}

void Tensor::forbid_writing() {
  ACCELRT_CHECK(mprotect(room_begin_, static_cast<size_t>(room_), PROT_READ) == 0, "mprotect");
}

void Tensor::check(const Values& expected, float relative, float absolute) const {
  const int64_t size = size_of(dtype_);
  std::vector<bool> used(static_cast<size_t>(room_), false);
  each([&](int64_t i, int64_t offset) {
    const unsigned char* const at = data_ + offset * size;
    std::fill_n(used.begin() + (at - room_begin_), size, true);
    unsigned char nearest[4];
    const float truth = expected.at(static_cast<size_t>(i));
    put(dtype_, truth, nearest);
    const float value = get(dtype_, at);
    const bool close = std::abs(value - truth) <= relative * std::abs(truth) + absolute;
    ACCELRT_CHECK(close || value == get(dtype_, nearest), "element ", i, " is ", value,
                  ", expected ", truth);
  });
  for (int64_t i = 0; i < room_; ++i) {
    ACCELRT_CHECK(used[static_cast<size_t>(i)] || room_begin_[i] == kUnused, "byte ",
                  room_begin_ + i - data_, " from the first element, which is none's, was written");
  }
}

bool runs(Isa isa, DType dtype) {
  const bool emulated = isa == Isa::kAMXEmulated;
  if (emulated && dtype != DType::kBFloat16) return false;
  if ((emulated ? Isa::kAVX512BF16 : isa) > best_isa()) return false;
  if (std::count(g_ran.begin(), g_ran.end(), isa) == 0) g_ran.push_back(isa);
  return true;
}

std::string ran() {
  std::string names;
  for (const Isa isa : g_ran) names += (names.empty() ? "" : " ") + std::string(name_of(isa));
  return names;
}

void set_pieces(bool many) { set_parallel_backend(many ? in_pieces : whole); }

}  // namespace accelrt::guarded
