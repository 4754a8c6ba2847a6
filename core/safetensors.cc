#include "core/safetensors.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/json.h"
#include "core/regular_file.h"

namespace attn {
namespace {

constexpr char kReason[] = "BAD_SAFETENSORS";
constexpr char kMetadataName[] = "__metadata__";
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // as upstream
constexpr std::size_t kMaxTensors = std::size_t{1}
                                    << 20;  // an entry costs far more memory than header text
constexpr std::size_t kMaxRank = 8;
constexpr std::size_t kMaxNameBytes = 1024;

// Every dtype of the format, since each tensor's size is checked, also of those that attention does
// not need.
struct FileDType {
  const char* name;
  unsigned bits;
  DType dtype;
};
constexpr FileDType kFileDTypes[] = {
    {"F32", 32, DType::kFloat32},        {"F16", 16, DType::kFloat16},
    {"BF16", 16, DType::kBFloat16},      {"F64", 64, DType::kUnspecified},
    {"I64", 64, DType::kUnspecified},    {"U64", 64, DType::kUnspecified},
    {"I32", 32, DType::kUnspecified},    {"U32", 32, DType::kUnspecified},
    {"I16", 16, DType::kUnspecified},    {"U16", 16, DType::kUnspecified},
    {"I8", 8, DType::kUnspecified},      {"U8", 8, DType::kUnspecified},
    {"BOOL", 8, DType::kUnspecified},    {"F8_E4M3", 8, DType::kUnspecified},
    {"F8_E5M2", 8, DType::kUnspecified}, {"F8_E8M0", 8, DType::kUnspecified},
    {"F6_E2M3", 6, DType::kUnspecified}, {"F6_E3M2", 6, DType::kUnspecified},
    {"F4", 4, DType::kUnspecified},      {"C64", 64, DType::kUnspecified},
};

const FileDType* FindDType(const std::string& name) {
  for (const FileDType& row : kFileDTypes) {
    if (name == row.name) return &row;
  }
  return nullptr;
}

struct HeaderTensor {
  std::string name;
  const FileDType* dtype = nullptr;
  std::optional<std::vector<std::uint64_t>> shape;
  std::optional<std::vector<std::uint64_t>> offsets;
};

// Takes the header's events as the parser meets them and stops at the first that the format does
// not have, so that a header costs no more than what it rightly describes.
class HeaderHandler {
 public:
  using json = nlohmann::json;

  bool null() { return Unexpected("null"); }
  bool boolean(bool) { return Unexpected("a boolean"); }
  bool number_integer(json::number_integer_t) { return Unexpected("a negative number"); }
  bool number_float(json::number_float_t, const std::string&) {
    return Unexpected("a number that is no 64-bit integer");
  }
  bool binary(json::binary_t&) { return Unexpected("binary data"); }

  bool number_unsigned(json::number_unsigned_t value) {
    if (place_ == Place::kShape) {
      if (tensor_.shape->size() == kMaxRank) {
        return Fail(absl::StrCat("has more than ", kMaxRank, " dimensions"));
      }
      tensor_.shape->push_back(value);
      return true;
    }
    if (place_ == Place::kOffsets) {
      if (tensor_.offsets->size() == 2) return Fail("has more than two data_offsets");
      tensor_.offsets->push_back(value);
      return true;
    }
    return Unexpected("a number");
  }

  bool string(std::string& value) {
    if (place_ == Place::kMetadata) return true;
    if (place_ != Place::kTensor || field_ != "dtype") return Unexpected("a string");
    tensor_.dtype = FindDType(value);
    return tensor_.dtype != nullptr || Fail(absl::StrCat("has the unknown dtype ", Quoted(value)));
  }

  bool start_object(std::size_t) {
    if (place_ == Place::kStart) {
      place_ = Place::kTop;
    } else if (place_ == Place::kTop) {
      place_ = tensor_.name == kMetadataName ? Place::kMetadata : Place::kTensor;
      keys_.clear();
    } else {
      return Unexpected("an object");
    }
    return true;
  }

  bool key(std::string& name) {
    if (place_ == Place::kTop) {
      tensor_ = HeaderTensor();
      tensor_.name = name;
      if (name.size() > kMaxNameBytes) return Fail("has an absurdly long name");
      if (!names_.insert(name).second) return Fail("occurs twice");
      return names_.size() <= kMaxTensors || Fail("is one tensor too many");
    }
    if (!keys_.insert(name).second) return Fail(absl::StrCat("has ", Quoted(name), " twice"));
    if (place_ == Place::kTensor && name != "dtype" && name != "shape" && name != "data_offsets") {
      return Fail(absl::StrCat("has the unknown field ", Quoted(name)));
    }
    field_ = name;
    return true;
  }

  bool end_object() {
    if (place_ == Place::kTop) {
      place_ = Place::kEnd;
      return true;
    }
    if (place_ == Place::kTensor) {
      if (tensor_.dtype == nullptr) return Fail("has no dtype");
      if (!tensor_.shape) return Fail("has no shape");
      if (!tensor_.offsets) return Fail("has no data_offsets");
      if (tensor_.offsets->size() != 2) return Fail("needs two data_offsets");
      tensors_.push_back(std::move(tensor_));
    }
    place_ = Place::kTop;
    return true;
  }

  bool start_array(std::size_t) {
    if (place_ != Place::kTensor || field_ == "dtype") return Unexpected("an array");
    const bool is_shape = field_ == "shape";
    (is_shape ? tensor_.shape : tensor_.offsets).emplace();
    place_ = is_shape ? Place::kShape : Place::kOffsets;
    return true;
  }

  bool end_array() {
    place_ = Place::kTensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) {
    error_ = absl::StrCat("header is not JSON (at byte ", position, ")");
    return false;
  }

  const std::string& error() const { return error_; }
  std::vector<HeaderTensor>& tensors() { return tensors_; }

 private:
  enum class Place { kStart, kTop, kTensor, kMetadata, kShape, kOffsets, kEnd };

  bool Fail(const std::string& problem) {
    error_ = absl::StrCat("tensor ", Quoted(tensor_.name), " ", problem);
    return false;
  }

  bool Unexpected(const char* what) {
    if (place_ == Place::kTop) return Fail(absl::StrCat("is ", what, " instead of an object"));
    return Fail(absl::StrCat("has ", what, " where the format has none, in ", Quoted(field_)));
  }

  Place place_ = Place::kStart;
  HeaderTensor tensor_;
  std::string field_;
  std::set<std::string> keys_;   // of the object that is open, below the top
  std::set<std::string> names_;  // at the top
  std::vector<HeaderTensor> tensors_;
  std::string error_;
};

absl::Status Bad(const std::string& label, const std::string& problem) {
  return MakeError(absl::StatusCode::kInvalidArgument, kReason, absl::StrCat(label, ": ", problem),
                   {{"file", label}});
}

absl::Status BadTensor(const std::string& label, const HeaderTensor& tensor,
                       const std::string& problem) {
  return MakeError(absl::StatusCode::kInvalidArgument, kReason,
                   absl::StrCat(label, ": tensor ", Quoted(tensor.name), " ", problem),
                   {{"file", label}, {"tensor", tensor.name}});
}

// The bytes that dtype and shape call for; nothing where they are no whole number or too many for
// 63 bits.
std::optional<std::uint64_t> NeededBytes(const HeaderTensor& tensor) {
  constexpr std::uint64_t kLargest = std::numeric_limits<std::int64_t>::max();
  std::uint64_t product = 1;
  for (std::uint64_t extent : *tensor.shape) {
    if (extent > kLargest || __builtin_mul_overflow(product, extent, &product)) return std::nullopt;
  }
  if (__builtin_mul_overflow(product, std::uint64_t{tensor.dtype->bits}, &product)) {
    return std::nullopt;
  }
  if (product % 8 != 0 || product > kLargest) return std::nullopt;
  return product / 8;
}

absl::Status CheckTensor(const std::string& label, const HeaderTensor& tensor,
                         std::uint64_t data_bytes) {
  const std::uint64_t begin = (*tensor.offsets)[0];
  const std::uint64_t end = (*tensor.offsets)[1];
  if (begin > end || end > data_bytes) {
    return BadTensor(label, tensor,
                     absl::StrCat("has data_offsets [", begin, ", ", end,
                                  "], which do not lie in the file's ", data_bytes, " data bytes"));
  }
  const std::optional<std::uint64_t> needed = NeededBytes(tensor);
  if (!needed) return BadTensor(label, tensor, "has a shape that no file can hold");
  if (*needed != end - begin) {
    return BadTensor(label, tensor,
                     absl::StrCat("has ", end - begin, " bytes of data, but its shape needs ",
                                  *needed, " of ", tensor.dtype->name));
  }
  return absl::OkStatus();
}

// Tensors cover the data one after the other: no byte belongs to two of them, none to nobody.
absl::Status CheckCover(const std::string& label, const std::vector<HeaderTensor>& tensors,
                        std::uint64_t data_bytes) {
  std::vector<const HeaderTensor*> in_order;
  for (const HeaderTensor& tensor : tensors) in_order.push_back(&tensor);
  std::sort(in_order.begin(), in_order.end(),
            [](const HeaderTensor* a, const HeaderTensor* b) { return *a->offsets < *b->offsets; });
  std::uint64_t covered = 0;
  for (const HeaderTensor* tensor : in_order) {
    const std::uint64_t begin = (*tensor->offsets)[0];
    if (begin < covered) return BadTensor(label, *tensor, "overlaps the one before it");
    if (begin > covered) return BadTensor(label, *tensor, "leaves a hole before it");
    covered = (*tensor->offsets)[1];
  }
  if (covered != data_bytes) {
    return Bad(label, absl::StrCat("has ", data_bytes - covered, " bytes after the last tensor"));
  }
  return absl::OkStatus();
}

std::uint64_t LittleEndian64(const unsigned char* bytes) {
  std::uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

absl::StatusOr<std::map<std::string, SafetensorsEntry>> ReadHeader(const unsigned char* file,
                                                                   std::size_t bytes,
                                                                   const std::string& label) {
  const std::uint64_t header_bytes = LittleEndian64(file);
  if (header_bytes > kMaxHeaderBytes || header_bytes > bytes - 8) {
    return Bad(label,
               absl::StrCat("says that its header has ", header_bytes, " bytes; it has ", bytes - 8,
                            " after the length, and ", kMaxHeaderBytes, " are allowed"));
  }
  const char* header = reinterpret_cast<const char*>(file) + 8;
  // The format wants the brace first; this also keeps out a byte order mark, which the parser would
  // skip.
  if (header_bytes == 0 || header[0] != '{') return Bad(label, "header does not begin with {");
  if (HasNulByte(header, header_bytes))
    return Bad(label, "header is not JSON (it holds a NUL byte)");
  HeaderHandler handler;
  if (!nlohmann::json::sax_parse(header, header + header_bytes, &handler)) {
    return Bad(label, handler.error());
  }
  const std::uint64_t data_bytes = bytes - 8 - header_bytes;
  for (const HeaderTensor& tensor : handler.tensors()) {
    ATTN_RETURN_IF_ERROR(CheckTensor(label, tensor, data_bytes));
  }
  ATTN_RETURN_IF_ERROR(CheckCover(label, handler.tensors(), data_bytes));
  std::map<std::string, SafetensorsEntry> entries;
  for (const HeaderTensor& tensor : handler.tensors()) {
    SafetensorsEntry& entry = entries[tensor.name];
    entry.dtype = tensor.dtype->dtype;
    entry.dtype_name = tensor.dtype->name;
    entry.shape.assign(tensor.shape->begin(), tensor.shape->end());
    entry.data = file + 8 + header_bytes + (*tensor.offsets)[0];
    entry.bytes = (*tensor.offsets)[1] - (*tensor.offsets)[0];
  }
  return entries;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(
    const std::string& path, const std::string& label) try {
  ATTN_ASSIGN_OR_RETURN(const RegularFile file, RegularFile::Open(path, label, kReason));
  if (file.bytes() < 8) {
    return Bad(label, absl::StrCat("has ", file.bytes(), " bytes, less than a header's length"));
  }
  std::unique_ptr<SafetensorsFile> result(new SafetensorsFile());
  void* mapping = mmap(nullptr, file.bytes(), PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
  if (mapping == MAP_FAILED) {
    return MakeError(absl::StatusCode::kResourceExhausted, kReason,
                     absl::StrCat(label, ": can't be mapped into memory"), {{"file", label}});
  }
  result->mapping_ = mapping;
  result->mapping_bytes_ = file.bytes();
  ATTN_ASSIGN_OR_RETURN(result->entries_, ReadHeader(static_cast<const unsigned char*>(mapping),
                                                     file.bytes(), label));
  return result;
} catch (const std::bad_alloc&) {
  return MakeError(absl::StatusCode::kResourceExhausted, kReason,
                   absl::StrCat(label, ": no memory for its header"), {{"file", label}});
} catch (const std::exception&) {
  return Bad(label, "header can't be parsed");
}

SafetensorsFile::~SafetensorsFile() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
}

}  // namespace attn
