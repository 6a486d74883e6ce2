#include "safetensors.h"

#include <cstdlib>
#include <fstream>
#include <limits>
#include <new>
#include <vector>

#include "accelrt/check.h"

namespace {

using accelrt::DType;
using accelrt::TensorView;

constexpr std::align_val_t kAlignment{64};
constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own limit

struct Entry {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<int64_t> offsets;
};

// The JSON that such a header is made of: objects, lists of integers, strings.
class Parser {
 public:
  Parser(const std::string& path, const std::string& text) : path_(path), text_(text) {}

  // Calls `member(key)` with the parser in front of each value.
  template <typename Member>
  void object(const Member& member) {
    expect('{');
    if (accept('}')) return;
    do {
      const std::string key = string();
      expect(':');
      member(key);
    } while (accept(','));
    expect('}');
  }

  std::string string() {
    expect('"');
    std::string value;
    while (true) {
      const char c = next();
      if (c == '"') return value;
      ACCELRT_CHECK(c != '\\', path_, ": an escape in a string of the header at byte ", at_);
      value += c;
    }
  }

  std::vector<int64_t> integers() {
    std::vector<int64_t> values;
    expect('[');
    if (accept(']')) return values;
    do { values.push_back(integer()); } while (accept(','));
    expect(']');
    return values;
  }

  void end() {
    skip_space();
    ACCELRT_CHECK(at_ == text_.size(), path_, ": text after the header at byte ", at_);
  }

 private:
  char next() {
    ACCELRT_CHECK(at_ < text_.size(), path_, ": the header ends within a value");
    return text_[at_++];
  }

  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }

  bool accept(char c) {
    skip_space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    ACCELRT_CHECK(accept(c), path_, ": expected '", c, "' in the header at byte ", at_);
  }

  int64_t integer() {
    skip_space();
    int64_t value = 0;
    const size_t begin = at_;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      ACCELRT_CHECK(value <= (std::numeric_limits<int64_t>::max() - 9) / 10, path_,
                    ": a number of the header overflows at byte ", at_);
      value = 10 * value + (text_[at_] - '0');
    }
    ACCELRT_CHECK(at_ > begin, path_, ": expected a number in the header at byte ", at_);
    return value;
  }

  const std::string& path_;
  const std::string& text_;
  size_t at_ = 0;
};

DType dtype_of(const std::string& path, const std::string& name, const std::string& dtype) {
  if (dtype == "F32") return DType::kFloat32;
  if (dtype == "BF16") return DType::kBFloat16;
  ACCELRT_CHECK(dtype == "F16", path, ": ", name, " is ", dtype, "; allowed: F32, BF16, F16");
  return DType::kFloat16;
}

TensorView view_of(const std::string& path, const std::string& name, const Entry& entry,
                   unsigned char* data, int64_t data_bytes) {
  TensorView view;
  view.dtype = dtype_of(path, name, entry.dtype);
  ACCELRT_CHECK(entry.shape.size() <= static_cast<size_t>(accelrt::kMaxDims), path, ": ", name,
                " has ", entry.shape.size(), " dimensions; at most ", accelrt::kMaxDims);
  view.ndim = static_cast<int>(entry.shape.size());
  int64_t bytes = accelrt::size_of(view.dtype);
  int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.size[d] = entry.shape[d];
    view.stride[d] = stride;
    ACCELRT_CHECK(!__builtin_mul_overflow(bytes, view.size[d], &bytes), path, ": the size of ",
                  name, " overflows");
    stride *= view.size[d];
  }
  ACCELRT_CHECK(entry.offsets.size() == 2 && entry.offsets[0] <= entry.offsets[1] &&
                    entry.offsets[1] <= data_bytes && entry.offsets[1] - entry.offsets[0] == bytes,
                path, ": the bytes of ", name, " are not ", bytes, " of the file's ", data_bytes);
  view.data = data + entry.offsets[0];
  return view;
}

}  // namespace

void Safetensors::Free::operator()(unsigned char* memory) const {
  ::operator delete(memory, kAlignment);
}

Safetensors::Safetensors(const std::string& path) : path_(path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  ACCELRT_CHECK(file, path, " cannot be read");
  const auto size = static_cast<uint64_t>(file.tellg());
  unsigned char prefix[8] = {};
  file.seekg(0);
  file.read(reinterpret_cast<char*>(prefix), 8);
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | prefix[i];
  ACCELRT_CHECK(size >= 8 && header_bytes <= kMaxHeader && header_bytes <= size - 8, path,
                " is no safetensors file, or is cut off");

  std::string header(header_bytes, '\0');
  file.read(header.data(), static_cast<std::streamsize>(header_bytes));
  const auto data_bytes = static_cast<int64_t>(size - 8 - header_bytes);
  data_.reset(static_cast<unsigned char*>(::operator new(data_bytes, kAlignment)));
  file.read(reinterpret_cast<char*>(data_.get()), data_bytes);
  ACCELRT_CHECK(file, path, " cannot be read to its end");

  Parser parser(path_, header);
  parser.object([&](const std::string& name) {
    if (name == "__metadata__") {
      parser.object([&](const std::string& key) { metadata_[key] = parser.string(); });
      return;
    }
    Entry entry;
    parser.object([&](const std::string& key) {
      if (key == "dtype") {
        entry.dtype = parser.string();
      } else if (key == "shape") {
        entry.shape = parser.integers();
      } else {
        ACCELRT_CHECK(key == "data_offsets", path_, ": unknown key ", key, " of ", name);
        entry.offsets = parser.integers();
      }
    });
    tensors_[name] = view_of(path_, name, entry, data_.get(), data_bytes);
  });
  parser.end();
}

TensorView Safetensors::tensor(const std::string& name) const {
  const auto found = tensors_.find(name);
  ACCELRT_CHECK(found != tensors_.end(), path_, " holds no tensor ", name);
  return found->second;
}

const std::string& Safetensors::text(const std::string& name) const {
  const auto found = metadata_.find(name);
  ACCELRT_CHECK(found != metadata_.end(), path_, ": the metadata holds no ", name);
  return found->second;
}

double Safetensors::number(const std::string& name) const {
  const std::string& value = text(name);
  char* end = nullptr;
  const double parsed = std::strtod(value.c_str(), &end);
  ACCELRT_CHECK(!value.empty() && *end == '\0', path_, ": ", name, " is '", value,
                "'; expected a number");
  return parsed;
}

int64_t Safetensors::integer(const std::string& name) const {
  const double value = number(name);
  const auto whole = value >= 0 && value <= 1e9 ? static_cast<int64_t>(value) : -1;
  ACCELRT_CHECK(static_cast<double>(whole) == value, path_, ": ", name, " is ", value,
                "; expected an integer of 0 to 1e9");
  return whole;
}
