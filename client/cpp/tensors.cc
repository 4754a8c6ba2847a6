#include "client/cpp/tensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;

struct DataTypeRow {
  DataType dtype;
  const char* name;
  int64_t size;
  bool floating;
};

constexpr std::array<DataTypeRow, 7> kDataTypes = {{
    {v1::DATA_TYPE_FLOAT32, "float32", 4, true},
    {v1::DATA_TYPE_FLOAT16, "float16", 2, true},
    {v1::DATA_TYPE_BFLOAT16, "bfloat16", 2, true},
    {v1::DATA_TYPE_INT32, "int32", 4, false},
    {v1::DATA_TYPE_INT64, "int64", 8, false},
    {v1::DATA_TYPE_BOOL, "bool", 1, false},
    {v1::DATA_TYPE_INT8, "int8", 1, false},
}};

const DataTypeRow* FindDataType(DataType dtype) {
  for (const DataTypeRow& row : kDataTypes) {
    if (row.dtype == dtype) return &row;
  }
  return nullptr;
}

float LoadFloat(const char* data, DataType dtype) {
  if (dtype == v1::DATA_TYPE_FLOAT32) {
    float value;
    std::memcpy(&value, data, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, data, sizeof(bits));
  return dtype == v1::DATA_TYPE_FLOAT16 ? HalfToFloat(bits) : Bfloat16ToFloat(bits);
}

void StoreFloat(float value, DataType dtype, char* data) {
  if (dtype == v1::DATA_TYPE_FLOAT32) {
    std::memcpy(data, &value, sizeof(value));
    return;
  }
  const uint16_t bits =
      dtype == v1::DATA_TYPE_FLOAT16 ? FloatToHalf(value) : FloatToBfloat16(value);
  std::memcpy(data, &bits, sizeof(bits));
}

absl::StatusOr<Tensor> WithRoom(DataType dtype, const std::vector<int64_t>& shape, size_t count) {
  const absl::StatusOr<int64_t> bytes = ByteSize(dtype, shape);
  if (!bytes.ok()) return bytes.status();
  if (static_cast<uint64_t>(*bytes) != count * static_cast<uint64_t>(ElementSize(dtype))) {
    return absl::InvalidArgumentError(
        absl::StrCat(count, " values do not fill the shape [", absl::StrJoin(shape, ", "), "]"));
  }
  return Tensor{dtype, shape, std::string(static_cast<size_t>(*bytes), '\0')};
}

}  // namespace

int64_t ElementSize(DataType dtype) {
  const DataTypeRow* row = FindDataType(dtype);
  return row == nullptr ? 0 : row->size;
}

std::string DataTypeName(DataType dtype) {
  if (const DataTypeRow* row = FindDataType(dtype)) return row->name;
  if (dtype == v1::DATA_TYPE_UNSPECIFIED) return "unset";
  return absl::StrCat("dtype ", static_cast<int>(dtype));
}

std::optional<DataType> DataTypeFromName(const std::string& name) {
  for (const DataTypeRow& row : kDataTypes) {
    if (name == row.name) return row.dtype;
  }
  return std::nullopt;
}

bool IsFloating(DataType dtype) {
  const DataTypeRow* row = FindDataType(dtype);
  return row != nullptr && row->floating;
}

std::string ShapeText(const v1::Tensor& tensor) {
  return absl::StrCat("[", absl::StrJoin(tensor.shape(), ", "), "]");
}

absl::StatusOr<int64_t> ByteSize(DataType dtype, const std::vector<int64_t>& shape) {
  int64_t bytes = ElementSize(dtype);
  if (bytes == 0) {
    return absl::InvalidArgumentError(absl::StrCat("no tensor can be of ", DataTypeName(dtype)));
  }
  bool empty = false;
  for (const int64_t extent : shape) {
    if (extent < 0) return absl::InvalidArgumentError(absl::StrCat("dimension ", extent, " < 0"));
    if (extent == 0) empty = true;
  }
  if (empty) return 0;
  for (const int64_t extent : shape) {
    if (__builtin_mul_overflow(bytes, extent, &bytes)) {
      return absl::InvalidArgumentError(
          absl::StrCat("the shape [", absl::StrJoin(shape, ", "), "] has more than 2^63 bytes"));
    }
  }
  return bytes;
}

absl::Status CheckInlineTensor(const v1::Tensor& tensor) {
  if (tensor.has_shared_memory()) {
    return absl::InvalidArgumentError("the tensor's bytes lie in shared memory");
  }
  const auto bytes = ByteSize(tensor.dtype(), {tensor.shape().begin(), tensor.shape().end()});
  if (!bytes.ok()) return bytes.status();
  if (static_cast<uint64_t>(*bytes) != tensor.data().size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the tensor has ", tensor.data().size(), " bytes, and ", *bytes,
                     " by its shape ", ShapeText(tensor), " of ", DataTypeName(tensor.dtype())));
  }
  return absl::OkStatus();
}

v1::Tensor FloatTensor(const std::vector<int64_t>& shape, const std::vector<float>& values) {
  v1::Tensor tensor;
  tensor.set_dtype(v1::DATA_TYPE_FLOAT32);
  tensor.mutable_shape()->Assign(shape.begin(), shape.end());
  tensor.mutable_data()->assign(reinterpret_cast<const char*>(values.data()),
                                values.size() * sizeof(float));
  return tensor;
}

absl::StatusOr<v1::Tensor> ConvertFloating(const v1::Tensor& tensor, DataType dtype) {
  if (!IsFloating(tensor.dtype()) || !IsFloating(dtype)) {
    return absl::InvalidArgumentError(absl::StrCat("cannot convert ", DataTypeName(tensor.dtype()),
                                                   " to ", DataTypeName(dtype),
                                                   ": both must be floating types"));
  }
  if (absl::Status status = CheckInlineTensor(tensor); !status.ok()) return status;
  if (tensor.dtype() == dtype) return tensor;
  v1::Tensor result;
  result.set_dtype(dtype);
  *result.mutable_shape() = tensor.shape();
  const auto from_size = static_cast<size_t>(ElementSize(tensor.dtype()));
  const auto to_size = static_cast<size_t>(ElementSize(dtype));
  const size_t count = tensor.data().size() / from_size;
  result.mutable_data()->resize(count * to_size);
  const char* from = tensor.data().data();
  char* to = result.mutable_data()->data();
  for (size_t i = 0; i < count; ++i) {
    StoreFloat(LoadFloat(from + i * from_size, tensor.dtype()), dtype, to + i * to_size);
  }
  return result;
}

absl::StatusOr<Tensor> Tensor::FromFloats(const std::vector<int64_t>& shape,
                                          absl::Span<const float> values, DataType dtype) {
  if (!IsFloating(dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(DataTypeName(dtype), " is not a floating type"));
  }
  absl::StatusOr<Tensor> tensor = WithRoom(dtype, shape, values.size());
  if (!tensor.ok()) return tensor;
  const auto size = static_cast<size_t>(ElementSize(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    StoreFloat(values[i], dtype, tensor->bytes.data() + i * size);
  }
  return tensor;
}

absl::StatusOr<Tensor> Tensor::FromInts(const std::vector<int64_t>& shape,
                                        absl::Span<const int64_t> values) {
  absl::StatusOr<Tensor> tensor = WithRoom(v1::DATA_TYPE_INT64, shape, values.size());
  if (tensor.ok() && !values.empty()) {
    std::memcpy(tensor->bytes.data(), values.data(), tensor->bytes.size());
  }
  return tensor;
}

absl::StatusOr<Tensor> Tensor::FromBools(const std::vector<int64_t>& shape,
                                         const std::vector<bool>& values) {
  absl::StatusOr<Tensor> tensor = WithRoom(v1::DATA_TYPE_BOOL, shape, values.size());
  if (tensor.ok()) std::copy(values.begin(), values.end(), tensor->bytes.begin());
  return tensor;
}

absl::StatusOr<std::vector<float>> Tensor::ToFloats() const {
  const auto element = static_cast<size_t>(ElementSize(dtype));
  if (element == 0 || !IsFloating(dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(DataTypeName(dtype), " is not a floating type"));
  }
  const absl::StatusOr<int64_t> size = ByteSize(dtype, shape);
  if (!size.ok()) return size.status();
  if (static_cast<uint64_t>(*size) != bytes.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the tensor has ", bytes.size(), " bytes, and ", *size, " by its shape"));
  }
  std::vector<float> values(bytes.size() / element);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = LoadFloat(bytes.data() + i * element, dtype);
  }
  return values;
}

v1::Tensor ToProto(Tensor tensor) {
  v1::Tensor message;
  message.set_dtype(tensor.dtype);
  message.mutable_shape()->Assign(tensor.shape.begin(), tensor.shape.end());
  message.set_data(std::move(tensor.bytes));
  return message;
}

Tensor FromProto(v1::Tensor message) {
  Tensor tensor;
  tensor.dtype = message.dtype();
  tensor.shape.assign(message.shape().begin(), message.shape().end());
  tensor.bytes = std::move(*message.mutable_data());
  return tensor;
}

uint16_t FloatToHalf(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  // 65520 is half way between float16's largest value and the next one that it lacks.
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by the FPU.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

float HalfToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude >= 0x400u) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
  const float value = static_cast<float>(magnitude) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

uint16_t FloatToBfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float Bfloat16ToFloat(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

}  // namespace attn::client
