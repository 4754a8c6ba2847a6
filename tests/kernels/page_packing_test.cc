// Tokens go into pages and come back, for every instruction set, dtype and odd size: places, bits
// and scales against a loop over single elements; what is not written or read stays untouched.
#include "kernels/cpu/page_packing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cpu/isa.h"
#include "tests/reference/attention_reference.h"

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

// Rows of random bits (numbers of every size, subnormal ones, infinities, NaNs), or of numbers near
// 1, at an odd address between bytes that belong to nobody.
struct Rows {
  Rows(ElementType of, std::int64_t tokens, std::int64_t dim, bool any_bits, std::uint32_t seed)
      : type(of), stride(dim + 3), bytes(static_cast<std::size_t>(tokens * stride) * SizeOf(of)) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    bytes.insert(bytes.begin(), 0xab);
    for (std::int64_t i = 0; i < tokens * stride; ++i) {
      double value = normal(random);
      void* const to = data();
      if (!any_bits) {
        reference::WriteElement(value, of, to, i);
        continue;
      }
      const auto bits = static_cast<std::uint32_t>(random());
      std::memcpy(static_cast<unsigned char*>(to) + static_cast<std::size_t>(i) * SizeOf(of), &bits,
                  SizeOf(of));
    }
  }
  void* data() { return bytes.data() + 1; }
  const unsigned char* At(std::int64_t token, std::int64_t i) const {
    return bytes.data() + 1 + static_cast<std::size_t>(token * stride + i) * SizeOf(type);
  }
  float Value(std::int64_t token, std::int64_t i) const {
    return static_cast<float>(reference::ReadElement(type, At(token, i), 0));
  }

  ElementType type;
  std::int64_t stride;
  std::vector<unsigned char> bytes;
};

// Of a page: where its elements and scales lie, by the layout alone.
struct Page {
  explicit Page(const PageLayout& of)
      : layout(of), bytes(static_cast<std::size_t>(of.page_bytes()), 0xcd) {}
  unsigned char* Key(std::int64_t token, std::int64_t d) {
    return bytes.data() + layout.KeyElement(token, d) * layout.item_size();
  }
  unsigned char* Value(std::int64_t token, std::int64_t c) {
    return bytes.data() + layout.value_offset() +
           layout.ValueElement(token, c) * layout.item_size();
  }
  unsigned char* KeyScale(std::int64_t token) { return bytes.data() + layout.KeyScale(token); }
  unsigned char* ValueScale(std::int64_t token) {
    return bytes.data() + layout.value_offset() + layout.ValueScale(token);
  }

  PageLayout layout;
  std::vector<unsigned char> bytes;
};

void WriteConverted(const Rows& rows, std::int64_t token, std::int64_t i, ElementType type,
                    unsigned char* to) {
  if (rows.type == type) {
    std::memcpy(to, rows.At(token, i), SizeOf(type));
  } else {
    reference::WriteElement(rows.Value(token, i), type, to, 0);
  }
}

// NaNs need not be the same NaN.
::testing::AssertionResult SameElements(ElementType type, const std::vector<unsigned char>& got,
                                        const std::vector<unsigned char>& want) {
  for (std::size_t at = 0; at < got.size(); at += SizeOf(type)) {
    if (std::memcmp(&got[at], &want[at], SizeOf(type)) == 0) continue;
    const double a = reference::ReadElement(type, &got[at], 0);
    const double b = reference::ReadElement(type, &want[at], 0);
    if (!std::isnan(a) || !std::isnan(b)) {
      return ::testing::AssertionFailure() << "byte " << at << ": " << a << ", not " << b;
    }
  }
  return ::testing::AssertionSuccess();
}

constexpr std::pair<std::int64_t, std::int64_t> kDims[] = {
    {1, 1}, {3, 2}, {4, 4}, {8, 7}, {15, 16}, {17, 31}, {24, 40}, {80, 72}, {97, 100}, {128, 256}};
constexpr PageRange kRanges[] = {{0, 64}, {0, 16}, {1, 63}, {2, 35}, {3, 4}, {7, 9}, {60, 4}};

TEST_P(PagePacking, EveryElementIsWhereTheLayoutSaysAndRoundedToNearest) {
  std::uint32_t seed = 0;
  for (ElementType cache : kTypes) {
    for (ElementType type : kTypes) {
      for (const auto& [head_dim, value_dim] : kDims) {
        for (const PageRange& range : kRanges) {
          Page got({cache, head_dim, value_dim});
          Page want = got;
          Rows key(type, range.count, head_dim, seed % 2 == 0, seed);
          Rows value(type, range.count, value_dim, seed % 2 == 0, seed + 1);
          ++seed;
          for (std::int64_t t = 0; t < range.count; ++t) {
            for (std::int64_t d = 0; d < got.layout.padded_head_dim(); ++d) {
              std::memset(want.Key(range.first + t, d), 0, SizeOf(cache));
            }
            for (std::int64_t d = 0; d < head_dim; ++d) {
              WriteConverted(key, t, d, cache, want.Key(range.first + t, d));
            }
            for (std::int64_t c = 0; c < got.layout.padded_value_dim(); ++c) {
              std::memset(want.Value(range.first + t, c), 0, SizeOf(cache));
            }
            for (std::int64_t c = 0; c < value_dim; ++c) {
              WriteConverted(value, t, c, cache, want.Value(range.first + t, c));
            }
          }
          isa().pack_tokens(got.layout, {type, key.data(), value.data(), key.stride, value.stride},
                            range, got.bytes.data());
          ASSERT_TRUE(SameElements(cache, got.bytes, want.bytes))
              << "dtype " << static_cast<int>(type) << " to " << static_cast<int>(cache)
              << ", head_dim " << head_dim << ", value_dim " << value_dim << ", first "
              << range.first << ", count " << range.count;
        }
      }
    }
  }
}

// The definition in page_packing.h, for one token.
struct Quantised {
  Quantised(const Rows& rows, std::int64_t token, std::int64_t dim) {
    float largest = 0;
    for (std::int64_t i = 0; i < dim; ++i) {
      largest = std::max(largest, std::fabs(rows.Value(token, i)));
    }
    scale = largest / 127.0f;
    for (std::int64_t i = 0; i < dim; ++i) {
      elements.push_back(static_cast<signed char>(
          scale == 0.0f ? 0.0f : std::nearbyint(rows.Value(token, i) / scale)));
    }
  }
  float scale = 0;
  std::vector<signed char> elements;
};

TEST_P(PagePacking, Int8HasAScaleForEachToken) {
  std::uint32_t seed = 0;
  for (ElementType type : kTypes) {
    for (const auto& [head_dim, value_dim] : kDims) {
      for (const PageRange& range : kRanges) {
        Page got({ElementType::kInt8, head_dim, value_dim});
        Page want = got;
        Rows key(type, range.count, head_dim, false, ++seed);
        Rows value(type, range.count, value_dim, false, ++seed);
        const std::int64_t zero = range.count / 2;  // a token of zeros
        std::memset(static_cast<unsigned char*>(key.data()) +
                        static_cast<std::size_t>(zero * key.stride) * SizeOf(type),
                    0, static_cast<std::size_t>(head_dim) * SizeOf(type));
        const auto keys = static_cast<std::size_t>(range.count * key.stride);
        const auto values = static_cast<std::size_t>(range.count * value.stride);
        std::vector<float> want_key(keys, 9.0f);  // between the rows too
        std::vector<float> want_value(values, 9.0f);
        std::vector<float> got_key = want_key;
        std::vector<float> got_value = want_value;
        for (std::int64_t t = 0; t < range.count; ++t) {
          const std::int64_t token = range.first + t;
          const Quantised k(key, t, head_dim);
          const Quantised v(value, t, value_dim);
          std::memcpy(want.KeyScale(token), &k.scale, 4);
          std::memcpy(want.ValueScale(token), &v.scale, 4);
          for (std::int64_t d = 0; d < got.layout.padded_head_dim(); ++d) *want.Key(token, d) = 0;
          for (std::int64_t c = 0; c < got.layout.padded_value_dim(); ++c) {
            *want.Value(token, c) = 0;
          }
          for (std::size_t d = 0; d < k.elements.size(); ++d) {
            std::memcpy(want.Key(token, static_cast<std::int64_t>(d)), &k.elements[d], 1);
            want_key[static_cast<std::size_t>(t * key.stride) + d] = k.elements[d] * k.scale;
          }
          for (std::size_t c = 0; c < v.elements.size(); ++c) {
            std::memcpy(want.Value(token, static_cast<std::int64_t>(c)), &v.elements[c], 1);
            want_value[static_cast<std::size_t>(t * value.stride) + c] = v.elements[c] * v.scale;
          }
        }
        isa().pack_tokens(got.layout, {type, key.data(), value.data(), key.stride, value.stride},
                          range, got.bytes.data());
        ASSERT_EQ(got.bytes, want.bytes)
            << "dtype " << static_cast<int>(type) << ", head_dim " << head_dim << ", value_dim "
            << value_dim << ", first " << range.first << ", count " << range.count;
        isa().unpack_tokens(
            got.layout, got.bytes.data(), range,
            {ElementType::kFloat32, got_key.data(), got_value.data(), key.stride, value.stride});
        ASSERT_EQ(got_key, want_key);
        ASSERT_EQ(got_value, want_value);
      }
    }
  }
}

// Extremes of one token leave its neighbours alone; both where tokens and dimensions fill vectors
// and where they do not.
TEST_P(PagePacking, Int8KeepsInfinitiesNaNsAndExtremes) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kSubnormal = std::numeric_limits<float>::denorm_min();
  constexpr float kMax = std::numeric_limits<float>::max();
  constexpr std::int64_t kDim = 35;
  for (const std::int64_t at : {0, 13, 34}) {
    for (const PageRange range : {PageRange{0, 64}, PageRange{3, 6}}) {
      const PageLayout layout = {ElementType::kInt8, kDim, kDim};
      std::vector<float> rows(static_cast<std::size_t>(range.count * kDim), 0.0f);
      const auto row = [&](std::int64_t t) { return rows.data() + t * kDim; };
      row(0)[at] = kInfinity;
      row(1)[at] = -std::nanf("");
      row(2)[at] = kSubnormal;
      row(3)[at] = 190 * kSubnormal;  // its scale is the smallest number
      row(4)[at] = -kMax;
      row(5)[at] = 1.0f;
      row(5)[(at + 1) % kDim] = 0.5f / 127.0f;  // halfway, to even
      std::vector<unsigned char> page(static_cast<std::size_t>(layout.page_bytes()));
      std::vector<float> key(rows.size());
      std::vector<float> value(rows.size());
      isa().pack_tokens(layout, {ElementType::kFloat32, rows.data(), rows.data(), kDim, kDim},
                        range, page.data());
      isa().unpack_tokens(layout, page.data(), range,
                          {ElementType::kFloat32, key.data(), value.data(), kDim, kDim});
      for (const std::vector<float>& got : {key, value}) {
        const auto element = [&](std::int64_t t, std::int64_t d) {
          return got[static_cast<std::size_t>(t * kDim + d)];
        };
        for (std::int64_t d = 0; d < kDim; ++d) {
          EXPECT_TRUE(std::isnan(element(0, d))) << at;
          EXPECT_TRUE(std::isnan(element(1, d))) << at;
          EXPECT_EQ(element(2, d), 0.0f) << at;
        }
        EXPECT_EQ(element(3, at), 127 * kSubnormal);
        EXPECT_NEAR(element(4, at) / kMax, -1.0f, 1e-6f);
        EXPECT_EQ(element(5, (at + 1) % kDim), 0.0f);
        EXPECT_EQ(element(5, at), 127 * (1.0f / 127.0f));
      }
    }
  }
}

TEST(PageLayout, EveryByteHasOneUse) {
  for (ElementType type :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16, ElementType::kInt8}) {
    const PageLayout layout = {type, 7, 5};
    std::vector<int> used(static_cast<std::size_t>(layout.page_bytes()));
    const auto use = [&](std::int64_t at, std::int64_t bytes, std::int64_t end) {
      ASSERT_LE(at + bytes, end);
      for (std::int64_t i = at; i < at + bytes; ++i) ++used[static_cast<std::size_t>(i)];
    };
    const std::int64_t item = layout.item_size();
    const std::int64_t values = layout.value_offset();
    EXPECT_EQ(values % kPageAlignment, 0);
    EXPECT_EQ(layout.page_bytes() % kPageAlignment, 0);
    EXPECT_EQ(layout.KeyScale(0) % kPageAlignment, 0);
    EXPECT_EQ(layout.ValueScale(0) % kPageAlignment, 0);
    for (std::int64_t t = 0; t < kPageTokens; ++t) {
      for (std::int64_t d = 0; d < layout.padded_head_dim(); ++d) {
        use(layout.KeyElement(t, d) * item, item, values);
      }
      for (std::int64_t c = 0; c < layout.padded_value_dim(); ++c) {
        use(values + layout.ValueElement(t, c) * item, item, layout.page_bytes());
      }
      if (!layout.has_scales()) continue;
      use(layout.KeyScale(t), 4, values);
      use(values + layout.ValueScale(t), 4, layout.page_bytes());
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
