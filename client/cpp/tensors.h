// Tensors of the API on the client's side: names and sizes of data types, checks, and conversion
// between floating types.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "attention/v1/types.pb.h"

namespace attn::client {

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
