// accelrt_sim <op> <cpu|cuda> <arguments in> <tensors out>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>

#include "sim_io.h"

namespace accelrt::sim {
namespace {

template <typename T>
T take(std::istream& in) {
  T value;
  in.read(reinterpret_cast<char*>(&value), sizeof(T));
  ACCELRT_CHECK(in.good(), "the argument file ends early");
  return value;
}

template <typename T>
void put(std::ostream& out, T value) {
  out.write(reinterpret_cast<const char*>(&value), sizeof(T));
}

template <typename Map>
const typename Map::mapped_type& find(const Map& map, const std::string& name) {
  const auto at = map.find(name);
  ACCELRT_CHECK(at != map.end(), "argument '", name, "' is missing");
  return at->second;
}

}  // namespace

std::map<std::string, Operator>& operators() {
  static std::map<std::string, Operator> map;
  return map;
}

Arguments Arguments::read(const std::string& path, Device device) {
  std::ifstream in(path, std::ios::binary);
  char magic[4] = {};
  in.read(magic, 4);
  ACCELRT_CHECK(std::string(magic, 4) == "ASIM", path, " is no argument file");
  Arguments arguments;
  const uint32_t count = take<uint32_t>(in);
  for (uint32_t i = 0; i < count; ++i) {
    std::string name(take<uint32_t>(in), '\0');
    in.read(name.data(), static_cast<std::streamsize>(name.size()));
    const uint8_t kind = take<uint8_t>(in);
    if (kind == 0) {
      arguments.integers_[name] = take<int64_t>(in);
    } else if (kind == 1) {
      arguments.numbers_[name] = take<double>(in);
    } else {
      Tensor t;
      t.view.device = device;
      t.view.dtype = static_cast<DType>(take<int32_t>(in));
      t.view.ndim = take<int32_t>(in);
      for (int d = 0; d < t.view.ndim; ++d) t.view.size[d] = take<int64_t>(in);
      for (int d = 0; d < t.view.ndim; ++d) t.view.stride[d] = take<int64_t>(in);
      t.bytes = take<int64_t>(in);
      t.storage = std::shared_ptr<unsigned char[]>(new unsigned char[t.bytes]);
      in.read(reinterpret_cast<char*>(t.storage.get()), t.bytes);
      t.view.data = t.storage.get();
      arguments.tensors_[name] = t;
    }
  }
  return arguments;
}

void Arguments::write_tensors(const std::string& path) const {
  std::ofstream out(path, std::ios::binary);
  out.write("ASIM", 4);
  put<uint32_t>(out, static_cast<uint32_t>(tensors_.size()));
  for (const auto& [name, t] : tensors_) {
    put<uint32_t>(out, static_cast<uint32_t>(name.size()));
    out.write(name.data(), static_cast<std::streamsize>(name.size()));
    put<int64_t>(out, t.bytes);
    out.write(reinterpret_cast<const char*>(t.storage.get()), t.bytes);
  }
  ACCELRT_CHECK(out.good(), "cannot write ", path);
}

int64_t Arguments::integer(const std::string& name) const { return find(integers_, name); }
double Arguments::number(const std::string& name) const { return find(numbers_, name); }
TensorView Arguments::tensor(const std::string& name) const { return find(tensors_, name).view; }

OptionalView Arguments::optional(const std::string& name) const {
  const auto at = tensors_.find(name);
  if (at == tensors_.end()) return std::nullopt;
  return at->second.view;
}

}  // namespace accelrt::sim

int main(int argc, char** argv) {
  using namespace accelrt;
  if (argc != 5) {
    std::cerr << "usage: " << argv[0] << " <op> <cpu|cuda> <arguments> <tensors>\noperators:";
    for (const auto& [name, op] : sim::operators()) std::cerr << ' ' << name;
    std::cerr << '\n';
    return 2;
  }
  try {
    const auto at = sim::operators().find(argv[1]);
    ACCELRT_CHECK(at != sim::operators().end(), "unknown operator '", argv[1], "'");
    const bool cuda = std::string(argv[2]) == "cuda";
    const auto arguments = sim::Arguments::read(argv[3], cuda ? Device::kCUDA : Device::kCPU);
    at->second(arguments);
    arguments.write_tensors(argv[4]);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
