// Tokens go into pages and come back, for every instruction set, dtype and odd size; what is not
// written or read stays untouched.
#include "kernels/cpu/page_packing.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cpu/isa.h"

namespace attn::kernels::cpu {
namespace {

constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kFloat16,
                                  ElementType::kBFloat16};

std::size_t SizeOf(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

// Bytes of `count` elements: values that every type holds exactly, different from their neighbours.
std::vector<unsigned char> Encode(ElementType type, const std::vector<float>& values) {
  std::vector<unsigned char> bytes(values.size() * SizeOf(type));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (type == ElementType::kFloat32) {
      std::memcpy(&bytes[i * 4], &values[i], 4);
      continue;
    }
    std::uint32_t bits = 0;
    std::memcpy(&bits, &values[i], 4);
    std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
    if (type == ElementType::kFloat16 && values[i] != 0.0f) {
      const std::uint32_t exponent = (bits >> 23 & 0xff) - 127 + 15;
      half = static_cast<std::uint16_t>(bits >> 16 & 0x8000) |
             static_cast<std::uint16_t>(exponent << 10) |
             static_cast<std::uint16_t>(bits >> 13 & 0x3ff);
    }
    std::memcpy(&bytes[i * 2], &half, 2);
  }
  return bytes;
}

// Small multiples of 1/8: exact in every type.
std::vector<float> Values(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> values(count);
  for (float& value : values) {
    const int eighths = static_cast<int>(random() % 127) - 63;
    value = static_cast<float>(eighths == 0 ? 1 : eighths) / 8.0f;
  }
  return values;
}

struct Case {
  ElementType cache;
  ElementType rows;
  std::int64_t head_dim;
  std::int64_t value_dim;
  PageRange range;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (ElementType cache : kTypes) {
    for (ElementType rows : kTypes) {
      for (const auto& [head_dim, value_dim] : {std::pair(1, 1), std::pair(7, 5), std::pair(16, 16),
                                                std::pair(33, 64), std::pair(128, 80)}) {
        for (const PageRange& range : {PageRange{0, 64}, PageRange{0, 1}, PageRange{63, 1},
                                       PageRange{13, 17}, PageRange{31, 33}, PageRange{5, 0}}) {
          cases.push_back({cache, rows, head_dim, value_dim, range});
        }
      }
    }
  }
  return cases;
}

class PagePacking : public testing::TestWithParam<std::int64_t> {
 protected:
  void SetUp() override {
    if (!isa().supported()) GTEST_SKIP() << isa().name << " does not run on this CPU";
  }
  const IsaKernels& isa() const { return CompiledIsas().rows[GetParam()]; }
};

TEST_P(PagePacking, TokensComeBack) {
  for (const Case& c : Cases()) {
    const PageLayout layout = {c.cache, c.head_dim, c.value_dim};
    const auto count = static_cast<std::size_t>(c.range.count);
    const std::int64_t key_stride = c.head_dim + 3;  // rows of other heads lie between
    const std::int64_t value_stride = c.value_dim + 1;
    const auto key = Values(count * static_cast<std::size_t>(key_stride), 1);
    const auto value = Values(count * static_cast<std::size_t>(value_stride), 2);
    const auto key_bytes = Encode(c.rows, key);
    const auto value_bytes = Encode(c.rows, value);
    std::vector<unsigned char> page(static_cast<std::size_t>(layout.page_bytes()), 0xff);  // NaN
    const std::vector<unsigned char> before = page;
    isa().pack_tokens(layout,
                      {c.rows, key_bytes.data(), value_bytes.data(), key_stride, value_stride},
                      c.range, page.data());

    // Other tokens of the page are as they were.
    const auto item = static_cast<std::size_t>(layout.item_size());
    for (std::int64_t token = 0; token < kPageTokens; ++token) {
      if (token >= c.range.first && token < c.range.first + c.range.count) continue;
      for (std::int64_t d = 0; d < c.head_dim; ++d) {
        const std::size_t at = static_cast<std::size_t>(layout.KeyElement(token, d)) * item;
        ASSERT_EQ(std::memcmp(&page[at], &before[at], item), 0);
      }
      for (std::int64_t d = 0; d < c.value_dim; ++d) {
        const std::size_t at = static_cast<std::size_t>(layout.value_offset()) +
                               static_cast<std::size_t>(layout.ValueElement(token, d)) * item;
        ASSERT_EQ(std::memcmp(&page[at], &before[at], item), 0);
      }
    }

    for (ElementType target : {c.cache, ElementType::kFloat32}) {
      // Odd strides, a sentinel behind every row.
      std::vector<unsigned char> got_key(
          count * static_cast<std::size_t>(key_stride) * SizeOf(target) + 1, 0xee);
      std::vector<unsigned char> got_value(
          count * static_cast<std::size_t>(value_stride) * SizeOf(target) + 1, 0xee);
      isa().unpack_tokens(layout, page.data(), c.range,
                          {target, got_key.data(), got_value.data(), key_stride, value_stride});
      const auto want_key = Encode(target, key);
      const auto want_value = Encode(target, value);
      for (std::size_t t = 0; t < count; ++t) {
        const std::size_t k = t * static_cast<std::size_t>(key_stride) * SizeOf(target);
        const std::size_t key_row = static_cast<std::size_t>(c.head_dim) * SizeOf(target);
        ASSERT_EQ(std::memcmp(&got_key[k], &want_key[k], key_row), 0)
            << isa().name << " token " << t << " of " << count << " head_dim " << c.head_dim;
        ASSERT_EQ(got_key[k + key_row], 0xee);
        const std::size_t v = t * static_cast<std::size_t>(value_stride) * SizeOf(target);
        const std::size_t value_row = static_cast<std::size_t>(c.value_dim) * SizeOf(target);
        ASSERT_EQ(std::memcmp(&got_value[v], &want_value[v], value_row), 0);
        ASSERT_EQ(got_value[v + value_row], 0xee);
      }
    }
  }
}

TEST_P(PagePacking, RoundsToNearestEvenAndKeepsSpecialValues) {
  const float inputs[] = {1.00390625f,  // halfway between two bfloat16: to the even one
                          1.01171875f,  // halfway again, upwards
                          std::numeric_limits<float>::infinity(),
                          std::nanf(""),
                          -0.0f,
                          65519.0f,
                          65520.0f};
  for (ElementType type : {ElementType::kFloat16, ElementType::kBFloat16}) {
    const PageLayout layout = {type, 7, 7};
    std::vector<unsigned char> page(static_cast<std::size_t>(layout.page_bytes()));
    isa().pack_tokens(layout, {ElementType::kFloat32, inputs, inputs, 7, 7}, {3, 1}, page.data());
    float key[7] = {};
    float value[7] = {};
    isa().unpack_tokens(layout, page.data(), {3, 1}, {ElementType::kFloat32, key, value, 7, 7});
    for (int i = 0; i < 7; ++i) {
      EXPECT_TRUE(key[i] == value[i] || (std::isnan(key[i]) && std::isnan(value[i]))) << i;
    }
    if (type == ElementType::kBFloat16) {
      EXPECT_EQ(key[0], 1.0f);
      EXPECT_EQ(key[1], 1.015625f);
      EXPECT_EQ(key[5], 65536.0f);
    } else {
      EXPECT_EQ(key[0], 1.00390625f);
      EXPECT_EQ(key[5], 65504.0f);
      EXPECT_EQ(key[6], std::numeric_limits<float>::infinity());
    }
    EXPECT_TRUE(std::isinf(key[2]));
    EXPECT_TRUE(std::isnan(key[3]));
    EXPECT_TRUE(std::signbit(key[4]));
  }
}

TEST(PageLayout, EveryElementHasAPlaceOfItsOwn) {
  for (ElementType type : kTypes) {
    const PageLayout layout = {type, 7, 5};
    std::vector<int> used(static_cast<std::size_t>(layout.page_bytes() / layout.item_size()));
    const std::int64_t values = layout.value_offset() / layout.item_size();
    EXPECT_EQ(layout.value_offset() % kPageAlignment, 0);
    EXPECT_EQ(layout.page_bytes() % kPageAlignment, 0);
    for (std::int64_t t = 0; t < kPageTokens; ++t) {
      for (std::int64_t d = 0; d < layout.padded_head_dim(); ++d) {
        ASSERT_LT(layout.KeyElement(t, d), values);
        ++used[static_cast<std::size_t>(layout.KeyElement(t, d))];
      }
      for (std::int64_t c = 0; c < 5; ++c) {
        ++used[static_cast<std::size_t>(values + layout.ValueElement(t, c))];
      }
    }
    for (int count : used) ASSERT_EQ(count, 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, PagePacking, testing::Range<std::int64_t>(0, CompiledIsas().size),
                         [](const testing::TestParamInfo<std::int64_t>& isa) {
                           return std::string(CompiledIsas().rows[isa.param].name);
                         });

}  // namespace
}  // namespace attn::kernels::cpu
