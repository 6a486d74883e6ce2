// Reads .safetensors files: an 8-byte length, a JSON header of that length, the tensors' bytes.
// https://github.com/huggingface/safetensors#format
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "accelrt/tensor_view.h"

class Safetensors {
 public:
  // The whole file, in memory. Throws accelrt::Error if it is no such file, names a byte outside
  // of it, or holds a tensor that is not float32, bfloat16 or float16.
  explicit Safetensors(const std::string& path);

  // A contiguous tensor; valid as long as this object lives. Throws if there is none of the name.
  accelrt::TensorView tensor(const std::string& name) const;

  // A value of the header's `__metadata__`. Throws if there is none of the name, or no number.
  const std::string& text(const std::string& name) const;
  int64_t integer(const std::string& name) const;
  double number(const std::string& name) const;

 private:
  struct Free {
    void operator()(unsigned char* memory) const;
  };

  std::string path_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, accelrt::TensorView> tensors_;
  std::unique_ptr<unsigned char, Free> data_;  // aligned to 64 bytes
};
