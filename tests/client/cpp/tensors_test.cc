#include "client/cpp/tensors.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace attn::client {
namespace {

using attention::v1::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// float16 by its definition, in double precision.
double HalfValue(uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1f;
  const int fraction = bits & 0x3ff;
  const double magnitude = exponent == 0    ? std::ldexp(fraction, -24)
                           : exponent == 31 ? (fraction == 0 ? kInfinity : kNan)
                                            : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// The nearest float16, ties to even, as nearbyint rounds in units of the last place.
double NearestHalf(double value) {
  const int exponent = value == 0 ? -14 : std::max(std::ilogb(value), -14);
  const double rounded =
      std::ldexp(std::nearbyint(std::ldexp(value, 10 - exponent)), exponent - 10);
  return std::abs(rounded) > 65504 ? std::copysign(kInfinity, value) : rounded;
}

TEST(HalfTest, EveryHalfSurvivesTheWayToFloatAndBack) {
  for (uint32_t i = 0; i <= 0xffff; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const double expected = HalfValue(bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(HalfToFloat(bits))) << i;
      ASSERT_TRUE(std::isnan(HalfToFloat(FloatToHalf(HalfToFloat(bits))))) << i;
      continue;
    }
    ASSERT_EQ(HalfToFloat(bits), expected) << i;
    ASSERT_EQ(FloatToHalf(HalfToFloat(bits)), bits) << i;
  }
}

TEST(HalfTest, RoundsToNearestEven) {
  // An odd stride reaches all exponents and both signs.
  for (uint64_t i = 0; i < (1ull << 32); i += 4093) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(i));
    if (!std::isfinite(value)) continue;
    ASSERT_EQ(HalfToFloat(FloatToHalf(value)), NearestHalf(value)) << value;
  }
  for (const float value : {65519.0f, 65520.0f, 0x1p-25f, 0x1.8p-24f, 0x1.002p0f, 0x1.006p0f}) {
    EXPECT_EQ(HalfToFloat(FloatToHalf(value)), NearestHalf(value)) << value;
  }
}

TEST(Bfloat16Test, RoundsToNearestEvenAndKeepsNan) {
  EXPECT_EQ(FloatToBfloat16(1.0f), 0x3f80);
  EXPECT_EQ(FloatToBfloat16(std::bit_cast<float>(0x3f808000u)), 0x3f80);  // a tie, to even
  EXPECT_EQ(FloatToBfloat16(std::bit_cast<float>(0x3f818000u)), 0x3f82);
  EXPECT_EQ(FloatToBfloat16(std::bit_cast<float>(0x3f808001u)), 0x3f81);
  EXPECT_EQ(FloatToBfloat16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(FloatToBfloat16(-kInfinity), 0xff80);
  // A NaN whose payload lies in the lower half alone must not become infinity.
  EXPECT_TRUE(std::isnan(Bfloat16ToFloat(FloatToBfloat16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(ConvertFloatingTest, BetweenAllTypes) {
  const Tensor floats = FloatTensor({2, 2}, {1.0f, -2.5f, kInfinity, kNan});
  for (const auto dtype : {attention::v1::DATA_TYPE_FLOAT16, attention::v1::DATA_TYPE_BFLOAT16}) {
    const auto narrow = ConvertFloating(floats, dtype);
    ASSERT_TRUE(narrow.ok());
    EXPECT_EQ(narrow->dtype(), dtype);
    EXPECT_EQ(narrow->data().size(), 8u);
    const auto back = ConvertFloating(*narrow, attention::v1::DATA_TYPE_FLOAT32);
    ASSERT_TRUE(back.ok());
    EXPECT_EQ(back->data(), floats.data());
    EXPECT_EQ(ShapeText(*back), "[2, 2]");
  }
}

TEST(ConvertFloatingTest, RefusesWhatIsNotFloatingOrLies) {
  Tensor tensor = FloatTensor({3}, {1, 2, 3});
  EXPECT_FALSE(ConvertFloating(tensor, attention::v1::DATA_TYPE_INT64).ok());
  tensor.set_shape(0, 4);
  EXPECT_FALSE(ConvertFloating(tensor, attention::v1::DATA_TYPE_FLOAT16).ok());
  tensor.mutable_shared_memory()->set_region("r");
  EXPECT_FALSE(CheckInlineTensor(tensor).ok());
}

TEST(ByteSizeTest, ChecksWhatAProductHides) {
  const auto dtype = attention::v1::DATA_TYPE_FLOAT32;
  EXPECT_EQ(ByteSize(dtype, {2, 3}).value(), 24);
  EXPECT_EQ(ByteSize(dtype, {}).value(), 4);
  EXPECT_EQ(ByteSize(dtype, {INT64_MAX, INT64_MAX, 0}).value(), 0);
  EXPECT_FALSE(ByteSize(dtype, {-1, -1}).ok());
  EXPECT_FALSE(ByteSize(dtype, {int64_t{1} << 32, int64_t{1} << 32}).ok());
  EXPECT_FALSE(ByteSize(attention::v1::DATA_TYPE_UNSPECIFIED, {1}).ok());
}

TEST(DataTypeTest, NamesGoBothWays) {
  for (const std::string name :
       {"float32", "float16", "bfloat16", "int32", "int64", "bool", "int8"}) {
    const auto dtype = DataTypeFromName(name);
    ASSERT_TRUE(dtype.has_value()) << name;
    EXPECT_EQ(DataTypeName(*dtype), name);
  }
  EXPECT_FALSE(DataTypeFromName("float64").has_value());
}

}  // namespace
}  // namespace attn::client
