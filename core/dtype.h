// Element types of tensors, named as in the API.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attn {

enum class DType : std::uint8_t {
  kUnspecified,
  kFloat32,
  kFloat16,
  kBFloat16,
  kInt32,
  kInt64,
  kBool,  // one byte, 0 or 1
  kInt8,  // sessions' caches only
};

constexpr std::size_t ItemSize(DType dtype) {
  switch (dtype) {
    case DType::kUnspecified:
      return 0;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt64:
      return 8;
    case DType::kBool:
    case DType::kInt8:
      return 1;
  }
  return 0;
}

constexpr bool IsFloating(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

constexpr const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kUnspecified:
      return "unspecified";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kBool:
      return "bool";
    case DType::kInt8:
      return "int8";
  }
  return "unspecified";
}

}  // namespace attn
