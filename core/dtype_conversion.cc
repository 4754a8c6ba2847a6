#include "core/dtype_conversion.h"

#include <bit>
#include <cstdint>
#include <cstring>

namespace attn {
namespace {

static_assert(std::endian::native == std::endian::little, "checkpoints are little-endian");

struct Float32 {
  using Bits = std::uint32_t;
  static float ToFloat(Bits bits) { return std::bit_cast<float>(bits); }
  static Bits FromFloat(float value) { return std::bit_cast<Bits>(value); }
};

struct BFloat16 {
  using Bits = std::uint16_t;
  static float ToFloat(Bits bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }
  static Bits FromFloat(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    // The carry of the rounding would turn some NaNs into infinities or zeros.
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bits>((bits >> 16) | 0x40u);
    return static_cast<Bits>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  using Bits = std::uint16_t;
  static float ToFloat(Bits bits) {
    const std::uint32_t sign = (bits & 0x8000u) << 16;
    const std::uint32_t exponent = (bits >> 10) & 0x1fu;
    const std::uint32_t fraction = bits & 0x3ffu;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
      return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
    }
    const std::uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
    return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
  }
  static Bits FromFloat(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      return static_cast<Bits>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    }
    // 65520 lies half way between the largest float16 and the next power of two: it rounds up, to
    // infinity.
    if (magnitude >= 0x477ff000u) return static_cast<Bits>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
      // Below the smallest normal number. 0.5f has the spacing of float16's subnormal numbers, so
      // the addition rounds.
      const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
      return static_cast<Bits>(sign | (std::bit_cast<std::uint32_t>(rounded) - 0x3f000000u));
    }
    const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
    return static_cast<Bits>(sign | rounded >> 13);
  }
};

template <typename From, typename To>
void ConvertLoop(const void* source, void* target, std::size_t count) {
  const auto* in = static_cast<const unsigned char*>(source);
  auto* out = static_cast<unsigned char*>(target);
  for (std::size_t i = 0; i < count; ++i) {
    typename From::Bits from;
    std::memcpy(&from, in + i * sizeof(from), sizeof(from));
    const typename To::Bits to = To::FromFloat(From::ToFloat(from));
    std::memcpy(out + i * sizeof(to), &to, sizeof(to));
  }
}

template <typename From>
void ConvertFrom(const void* source, void* target, DType to, std::size_t count) {
  if (to == DType::kFloat32) {
    ConvertLoop<From, Float32>(source, target, count);
  } else if (to == DType::kFloat16) {
    ConvertLoop<From, Float16>(source, target, count);
  } else {
    ConvertLoop<From, BFloat16>(source, target, count);
  }
}

}  // namespace

void ConvertElements(const void* source, DType from, void* target, DType to, std::size_t count) {
  if (count == 0) return;
  if (from == to) {
    std::memcpy(target, source, count * ItemSize(to));
  } else if (from == DType::kFloat32) {
    ConvertFrom<Float32>(source, target, to, count);
  } else if (from == DType::kFloat16) {
    ConvertFrom<Float16>(source, target, to, count);
  } else {
    ConvertFrom<BFloat16>(source, target, to, count);
  }
}

}  // namespace attn
