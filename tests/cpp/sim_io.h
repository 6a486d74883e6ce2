// The arguments of one simulated operator call, read from and written back to a file.
//
// Format, little endian: "ASIM", uint32 count, then per entry: uint32 name length, name,
// uint8 kind (0 int64, 1 double, 2 tensor), payload. Tensor payload: int32 dtype, int32 ndim,
// int64 sizes, int64 strides, int64 bytes, the storage. tests/sim.py writes it.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "accelrt/tensor_view.h"

namespace accelrt::sim {

class Arguments {
 public:
  static Arguments read(const std::string& path, Device device);
  void write_tensors(const std::string& path) const;

  int64_t integer(const std::string& name) const;
  double number(const std::string& name) const;
  TensorView tensor(const std::string& name) const;
  OptionalView optional(const std::string& name) const;  // absent entries are nullopt

 private:
  struct Tensor {
    TensorView view;
    // Exactly sized heap blocks, so that AddressSanitizer sees every overrun.
    std::shared_ptr<unsigned char[]> storage;
    int64_t bytes = 0;
  };
  std::map<std::string, int64_t> integers_;
  std::map<std::string, double> numbers_;
  std::map<std::string, Tensor> tensors_;
};

using Operator = std::function<void(const Arguments&)>;

std::map<std::string, Operator>& operators();

struct Register {
  Register(const std::string& name, Operator op) { operators()[name] = std::move(op); }
};

}  // namespace accelrt::sim
