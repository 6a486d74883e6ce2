// Memory in which a kernel cannot go astray unseen, for accelrt_cpu_check.
//
// AddressSanitizer does not see the loads and stores by mask and past the caches, which g++ takes
// for calls. Therefore a tensor begins or ends at a page that cannot be touched, and one that is
// read cannot be written. Bytes between and beside its elements make NaN of any dtype, and have to
// be there still when the kernel has run.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "accelrt/cpu_isa.h"
#include "accelrt/types.h"

namespace accelrt::guarded {

enum class Side { kBegin, kEnd };  // of the tensor, where the forbidden page is

// In the order of the elements, without gaps, whatever the dtype.
using Values = std::vector<float>;

// Multiples of 1/8 between -1 and 1: exact in every dtype, and so are sums of 200000 products in
// float32, in any order. What a kernel rounds once has one right result then.
Values eighths(int64_t count);

// A dimension, and how many elements lie unused after each index of it.
struct Axis {
  int64_t size;
  int64_t gap = 0;
};

class Tensor {
 public:
  Tensor(DType dtype, Side side, const std::vector<Axis>& axes);
  ~Tensor();
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  void* data() const { return data_; }
  int64_t stride(int axis) const { return stride_[static_cast<size_t>(axis)]; }
  void set(const Values& values);
  void forbid_writing();
  // Throws unless every element is the one nearest to the expected, or within `relative` of it
  // plus `absolute`, and what is no element is as it was.
  void check(const Values& expected, float relative = 0.f, float absolute = 0.f) const;

 private:
  template <typename Fn>
  void each(const Fn& fn) const;

  DType dtype_;
  std::vector<int64_t> size_;
  std::vector<int64_t> stride_;
  int64_t elements_ = 1;  // from the first to the last
  int64_t room_;          // bytes that can be touched
  unsigned char* room_begin_;
  unsigned char* data_;
};

// One that is only read.
class Input : public Tensor {
 public:
  Input(DType dtype, Side side, const std::vector<Axis>& axes, const Values& values)
      : Tensor(dtype, side, axes) {
    set(values);
    forbid_writing();
  }
};

template <typename Params>
struct Form {
  Isa isa;
  void (*kernel)(const Params&);
};

// Whether this processor has it, and a kernel of that level takes the dtype; notes that it ran.
bool runs(Isa isa, DType dtype);

// The levels that have run.
std::string ran();

// The work of a kernel as one piece, or as many from the last to the first, as threads may have it.
void set_pieces(bool many);

// Calls fn(kernel, side) for what runs, in one and in many pieces.
template <typename Params, typename Fn>
void for_forms(std::initializer_list<Form<Params>> forms, DType dtype, const Fn& fn) {
  for (const Form<Params>& form : forms) {
    if (!runs(form.isa, dtype)) continue;
    for (const Side side : {Side::kBegin, Side::kEnd}) {
      set_pieces(side == Side::kEnd);
      fn(form.kernel, side);
    }
  }
}

}  // namespace accelrt::guarded
