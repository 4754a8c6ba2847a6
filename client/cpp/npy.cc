#include "client/cpp/npy.h"

#include <sys/stat.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <optional>
#include <sstream>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cpp/tensors.h"

namespace attn::client {
namespace {

using attention::v1::DataType;

constexpr char kMagic[] = "\x93NUMPY";
constexpr size_t kMagicSize = 6;
constexpr size_t kAlignment = 64;           // of the data in the file, as NumPy writes it
constexpr uint64_t kMaxHeaderSize = 65535;  // what version 1 can hold; plain arrays need about 120
constexpr size_t kMaxDimensions = 64;       // NumPy's own limit
constexpr int64_t kMaxElements = int64_t{1} << 31;  // one message holds 2 GiB, whatever the type

// A type that float64 is converted from has no DataType of its own.
struct Descr {
  const char* text;
  DataType dtype;
  bool is_float64 = false;
};

// The first row of a type is the one that is written.
constexpr std::array<Descr, 9> kDescrs = {{
    {"<f4", attention::v1::DATA_TYPE_FLOAT32},
    {"<f2", attention::v1::DATA_TYPE_FLOAT16},
    {"<V2", attention::v1::DATA_TYPE_BFLOAT16},
    {"|V2", attention::v1::DATA_TYPE_BFLOAT16},  // the same once np.load and np.save had it
    {"bfloat16", attention::v1::DATA_TYPE_BFLOAT16},
    {"<i4", attention::v1::DATA_TYPE_INT32},
    {"<i8", attention::v1::DATA_TYPE_INT64},
    {"|b1", attention::v1::DATA_TYPE_BOOL},
    {"<f8", attention::v1::DATA_TYPE_FLOAT32, true},
}};

absl::Status Refuse(const std::string& name, const std::string& why) {
  return absl::InvalidArgumentError(absl::StrCat(name, ": ", why));
}

struct Header {
  std::string descr;
  bool fortran_order = false;
  std::vector<int64_t> shape;
};

// Reads the header's text: a Python dict with exactly the keys descr, fortran_order and shape. Only
// the literals that NumPy writes there are known; a failed step leaves what was wrong in error().
class HeaderParser {
 public:
  explicit HeaderParser(const std::string& text) : text_(text) {}

  std::optional<Header> Parse() {
    Header header;
    bool has_descr = false, has_order = false, has_shape = false;
    if (!Expect('{')) return std::nullopt;
    while (!Take('}')) {
      std::string key;
      if (!ParseString(&key) || !Expect(':')) return std::nullopt;
      bool* seen = key == "descr"           ? &has_descr
                   : key == "fortran_order" ? &has_order
                   : key == "shape"         ? &has_shape
                                            : nullptr;
      if (seen == nullptr) return Fail("an unknown key in the header");
      if (std::exchange(*seen, true)) return Fail(absl::StrCat("two keys '", key, "'"));
      const bool parsed = seen == &has_descr   ? ParseDescr(&header.descr)
                          : seen == &has_order ? ParseBool(&header.fortran_order)
                                               : ParseShape(&header.shape);
      if (!parsed) return std::nullopt;
      if (!Take(',') && Peek() != '}') return Fail("no ',' or '}' after a value");
    }
    if (Peek() != '\0') return Fail("text after the header's '}'");
    if (!has_descr || !has_order || !has_shape) {
      return Fail("descr, fortran_order or shape is missing");
    }
    return header;
  }

  const std::string& error() const { return error_; }

 private:
  std::nullopt_t Fail(const std::string& error) {
    if (error_.empty()) error_ = error;
    return std::nullopt;
  }

  // The next character that is not white space; '\0' at the end.
  char Peek() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  bool Take(char expected) {
    if (Peek() != expected) return false;
    ++at_;
    return true;
  }

  bool Expect(char expected) {
    if (Take(expected)) return true;
    Fail(absl::StrCat("no '", std::string(1, expected), "' at byte ", at_, " of the header"));
    return false;
  }

  bool ParseString(std::string* value) {
    const char quote = Peek();
    if (quote != '\'' && quote != '"') {
      Fail(absl::StrCat("no quoted string at byte ", at_, " of the header"));
      return false;
    }
    const size_t end = text_.find(quote, at_ + 1);
    if (end == std::string::npos) {
      Fail("a string in the header does not end");
      return false;
    }
    *value = text_.substr(at_ + 1, end - at_ - 1);
    at_ = end + 1;
    return true;
  }

  bool ParseDescr(std::string* value) {
    if (Peek() == '[') {
      Fail("a structured array; save its fields one by one");
      return false;
    }
    return ParseString(value);
  }

  bool ParseBool(bool* value) {
    Peek();
    for (const bool candidate : {false, true}) {
      const std::string word = candidate ? "True" : "False";
      if (text_.compare(at_, word.size(), word) == 0) {
        at_ += word.size();
        *value = candidate;
        return true;
      }
    }
    Fail("fortran_order is neither True nor False");
    return false;
  }

  bool ParseShape(std::vector<int64_t>* shape) {
    if (!Expect('(')) return false;
    while (!Take(')')) {
      Peek();
      size_t end = at_;
      while (end < text_.size() &&
             ((text_[end] >= '0' && text_[end] <= '9') || text_[end] == '-')) {
        ++end;
      }
      int64_t extent = 0;
      if (!absl::SimpleAtoi(text_.substr(at_, end - at_), &extent) || extent < 0) {
        Fail(absl::StrCat("a dimension that is no number from 0 to 2^63 at byte ", at_,
                          " of the header"));
        return false;
      }
      at_ = end;
      shape->push_back(extent);
      if (shape->size() > kMaxDimensions) {
        Fail(absl::StrCat("more than ", kMaxDimensions, " dimensions"));
        return false;
      }
      if (!Take(',') && Peek() != ')') {
        Fail("no ',' or ')' after a dimension");
        return false;
      }
    }
    return true;
  }

  const std::string& text_;
  size_t at_ = 0;
  std::string error_;
};

// Leaves `in` at the data.
absl::StatusOr<Header> ReadHeader(std::istream& in, uint64_t file_size, const std::string& name) {
  std::array<unsigned char, 12> prefix{};
  in.read(reinterpret_cast<char*>(prefix.data()), 10);
  if (in.gcount() != 10 || std::memcmp(prefix.data(), kMagic, kMagicSize) != 0) {
    return Refuse(name, "not a .npy file (numpy.save writes them)");
  }
  const int version = prefix[6];
  if (version < 1 || version > 3) {
    return Refuse(name, absl::StrCat("format version ", version, "; 1 to 3 are known"));
  }
  const size_t length_bytes = version == 1 ? 2 : 4;
  if (version > 1) {
    in.read(reinterpret_cast<char*>(prefix.data()) + 10, 2);
    if (in.gcount() != 2) return Refuse(name, "ends within its header");
  }
  uint64_t length = 0;
  for (size_t i = 0; i < length_bytes; ++i) {
    length |= static_cast<uint64_t>(prefix[8 + i]) << (8 * i);
  }
  if (length > kMaxHeaderSize) {
    return Refuse(name, absl::StrCat("a header of ", length, " bytes; at most ", kMaxHeaderSize,
                                     " are read"));
  }
  if (length > file_size - 8 - length_bytes) {
    return Refuse(name, absl::StrCat("a header of ", length, " bytes in a file of ", file_size));
  }
  std::string text(length, '\0');
  in.read(text.data(), static_cast<std::streamsize>(length));
  if (static_cast<uint64_t>(in.gcount()) != length) return Refuse(name, "ends within its header");
  HeaderParser parser(text);
  std::optional<Header> header = parser.Parse();
  if (!header) return Refuse(name, parser.error());
  return *std::move(header);
}

absl::StatusOr<Descr> FindDescr(const std::string& text, const std::string& name) {
  for (const Descr& descr : kDescrs) {
    if (text == descr.text) return descr;
  }
  if (text.find('O') != std::string::npos) {
    return Refuse(name, "an object array: reading one would run code from the file");
  }
  if (!text.empty() && text[0] == '>') {
    return Refuse(name, absl::StrCat("big-endian '", text, "'; convert it with a.astype('<",
                                     text.substr(1), "')"));
  }
  return Refuse(name, absl::StrCat("dtype '", text,
                                   "'; known are float32, float16, bfloat16, "
                                   "float64 (rounded), int32, int64 and bool"));
}

// Every value is rounded to the nearest float32.
std::string RoundToFloat(const std::string& doubles) {
  const size_t count = doubles.size() / sizeof(double);
  std::string floats(count * sizeof(float), '\0');
  for (size_t i = 0; i < count; ++i) {
    double value;
    std::memcpy(&value, doubles.data() + i * sizeof(double), sizeof(value));
    const auto rounded = static_cast<float>(value);
    std::memcpy(floats.data() + i * sizeof(float), &rounded, sizeof(rounded));
  }
  return floats;
}

absl::StatusOr<NpyFile> Read(std::istream& in, uint64_t file_size, const std::string& name) {
  absl::StatusOr<Header> header = ReadHeader(in, file_size, name);
  if (!header.ok()) return header.status();
  const absl::StatusOr<Descr> descr = FindDescr(header->descr, name);
  if (!descr.ok()) return descr.status();
  if (header->fortran_order) {
    return Refuse(name, "Fortran order; save numpy.ascontiguousarray(a) instead");
  }
  // An int64's size stands for the float64's that the API has no type for.
  const DataType stored = descr->is_float64 ? attention::v1::DATA_TYPE_INT64 : descr->dtype;
  const absl::StatusOr<int64_t> expected = ByteSize(stored, header->shape);
  if (!expected.ok()) return Refuse(name, std::string(expected.status().message()));
  const uint64_t present = file_size - static_cast<uint64_t>(in.tellg());
  if (static_cast<uint64_t>(*expected) != present) {
    return Refuse(
        name, absl::StrCat("shape (", absl::StrJoin(header->shape, ", "), ") of '", header->descr,
                           "' takes ", *expected, " bytes, and ", present, " follow the header"));
  }
  if (*expected / ElementSize(stored) > kMaxElements) {
    return Refuse(name, "more than 2^31 elements, beyond what a message can hold");
  }
  std::string data(present, '\0');
  in.read(data.data(), static_cast<std::streamsize>(present));
  if (static_cast<uint64_t>(in.gcount()) != present)
    return Refuse(name, "could not be read to its end");
  NpyFile file;
  file.tensor.set_dtype(descr->dtype);
  file.tensor.mutable_shape()->Assign(header->shape.begin(), header->shape.end());
  if (descr->is_float64) {
    data = RoundToFloat(data);
    file.note = absl::StrCat(name, ": float64 rounded to float32");
  }
  file.tensor.set_data(std::move(data));
  return file;
}

}  // namespace

absl::StatusOr<NpyFile> ReadNpy(const std::string& path) {
  struct stat status {};
  if (stat(path.c_str(), &status) != 0) {
    const std::string why = absl::StrCat(path, ": ", std::strerror(errno));
    return errno == ENOENT ? absl::NotFoundError(why) : absl::InvalidArgumentError(why);
  }
  if (!S_ISREG(status.st_mode)) return Refuse(path, "not a regular file");
  std::ifstream in(path, std::ios::binary);
  if (!in) return Refuse(path, std::strerror(errno));
  return Read(in, static_cast<uint64_t>(status.st_size), path);
}

absl::StatusOr<NpyFile> ParseNpy(const std::string& bytes, const std::string& name) {
  std::istringstream in(bytes);
  return Read(in, bytes.size(), name);
}

absl::StatusOr<std::string> NpyHeader(const attention::v1::Tensor& tensor) {
  for (const Descr& descr : kDescrs) {
    if (descr.dtype != tensor.dtype()) continue;
    std::string text = absl::StrCat(
        "{'descr': '", descr.text, "', 'fortran_order': False, 'shape': (",
        absl::StrJoin(tensor.shape(), ", "), tensor.shape_size() == 1 ? ",)" : ")", ", }");
    const size_t unpadded = kMagicSize + 4 + text.size() + 1;
    text.append((kAlignment - unpadded % kAlignment) % kAlignment, ' ');
    text.push_back('\n');
    if (text.size() > kMaxHeaderSize) return absl::InvalidArgumentError("too many dimensions");
    std::string header(kMagic, kMagicSize);
    header.append(
        {'\1', '\0', static_cast<char>(text.size() & 0xff), static_cast<char>(text.size() >> 8)});
    return header + text;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no .npy type for ", DataTypeName(tensor.dtype())));
}

absl::Status WriteNpy(const std::string& path, const attention::v1::Tensor& tensor) {
  if (absl::Status status = CheckInlineTensor(tensor); !status.ok()) {
    return Refuse(path, std::string(status.message()));
  }
  const absl::StatusOr<std::string> header = NpyHeader(tensor);
  if (!header.ok()) return Refuse(path, std::string(header.status().message()));
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  if (!out) return Refuse(path, absl::StrCat("cannot be written: ", std::strerror(errno)));
  out.write(header->data(), static_cast<std::streamsize>(header->size()));
  out.write(tensor.data().data(), static_cast<std::streamsize>(tensor.data().size()));
  out.close();
  if (!out) return Refuse(path, absl::StrCat("cannot be written: ", std::strerror(errno)));
  return absl::OkStatus();
}

}  // namespace attn::client
