// Tensors of the API on the client's side: names and sizes of data types, checks, and conversion
// between floating types.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/v1/types.pb.h"

namespace attn::client {

using DataType = attention::v1::DataType;
inline constexpr DataType kFloat32 = attention::v1::DATA_TYPE_FLOAT32;
inline constexpr DataType kFloat16 = attention::v1::DATA_TYPE_FLOAT16;
inline constexpr DataType kBfloat16 = attention::v1::DATA_TYPE_BFLOAT16;

// A dense row-major tensor in this process; without a dtype it stands for none at all. Moved into
// and out of calls, its bytes are not copied on the way.
struct Tensor {
  DataType dtype = attention::v1::DATA_TYPE_UNSPECIFIED;
  std::vector<int64_t> shape = {};
  std::string bytes = {};  // little-endian, as many as ByteSize(dtype, shape)

  // `values` are as many as the shape's product, or it is INVALID_ARGUMENT, as is a dtype that is
  // not floating. Narrower dtypes are rounded to nearest even.
  static absl::StatusOr<Tensor> FromFloats(const std::vector<int64_t>& shape,
                                           absl::Span<const float> values,
                                           DataType dtype = kFloat32);
  static absl::StatusOr<Tensor> FromInts(const std::vector<int64_t>& shape,
                                         absl::Span<const int64_t> values);
  static absl::StatusOr<Tensor> FromBools(const std::vector<int64_t>& shape,
                                          const std::vector<bool>& values);

  // Every element, of any floating dtype. INVALID_ARGUMENT for another dtype, or where the bytes do
  // not match the shape.
  absl::StatusOr<std::vector<float>> ToFloats() const;
};

attention::v1::Tensor ToProto(Tensor tensor);
// Of a tensor whose bytes are inline; without a dtype from none.
Tensor FromProto(attention::v1::Tensor message);

// Bytes of one element; 0 for no known type.
int64_t ElementSize(attention::v1::DataType dtype);

// "float32", "bool" ...; "unset" for DATA_TYPE_UNSPECIFIED.
std::string DataTypeName(attention::v1::DataType dtype);
// The reverse, for names of types that DataTypeName knows.
std::optional<attention::v1::DataType> DataTypeFromName(const std::string& name);

bool IsFloating(attention::v1::DataType dtype);

// "[1, 8, 128, 64]"
std::string ShapeText(const attention::v1::Tensor& tensor);

// product(shape) * ElementSize(dtype). INVALID_ARGUMENT for negative dimensions, an unknown type,
// or a product beyond int64.
absl::StatusOr<int64_t> ByteSize(attention::v1::DataType dtype, const std::vector<int64_t>& shape);

// OK where the tensor's bytes are inline and as many as its shape says.
absl::Status CheckInlineTensor(const attention::v1::Tensor& tensor);

// Copies `values` (row-major, product(shape) of them) into a float32 tensor.
attention::v1::Tensor FloatTensor(const std::vector<int64_t>& shape,
                                  const std::vector<float>& values);

// An inline tensor of a floating type as another one, rounded to nearest even; what is beyond the
// new type's range becomes infinite, NaN stays NaN. INVALID_ARGUMENT for other types.
absl::StatusOr<attention::v1::Tensor> ConvertFloating(const attention::v1::Tensor& tensor,
                                                      attention::v1::DataType dtype);

uint16_t FloatToHalf(float value);
float HalfToFloat(uint16_t bits);
uint16_t FloatToBfloat16(float value);
float Bfloat16ToFloat(uint16_t bits);

}  // namespace attn::client
