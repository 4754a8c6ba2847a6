// The reader against files whose headers lie in every way that we could think of.
#include "core/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <string>

#include "core/error.h"
#include "tests/core/safetensors_writer.h"

namespace attn {
namespace {

using testing::FloatTensor;
using testing::SafetensorsBytes;
using testing::TemporaryDirectory;
using testing::WithHeader;
using testing::WriteFile;

absl::StatusOr<std::unique_ptr<SafetensorsFile>> OpenBytes(const std::string& bytes) {
  const TemporaryDirectory directory;
  WriteFile(directory / "x", bytes);
  return SafetensorsFile::Open(directory / "x", "weights file");  // the mapping outlives the name
}

bool Contains(const absl::Status& status, const std::string& text) {
  return std::string(status.message()).find(text) != std::string::npos;
}

TEST(Safetensors, ReadsEveryTensor) {
  const auto file = OpenBytes(SafetensorsBytes({FloatTensor("a", {2, 3}, 1.0f),
                                                {"flags", "BOOL", {3}, std::string(3, '\1')},
                                                FloatTensor("scalar", {}, 7.0f),
                                                FloatTensor("empty", {0, 5}),
                                                {"odd", "BF16", {1}, std::string(2, '\0')}}));
  ASSERT_TRUE(file.ok()) << file.status();
  const auto& entries = (*file)->entries();
  ASSERT_EQ(entries.size(), 5u);
  const SafetensorsEntry& a = entries.at("a");
  EXPECT_EQ(a.dtype, DType::kFloat32);
  EXPECT_EQ(a.shape, (std::vector<std::int64_t>{2, 3}));
  ASSERT_EQ(a.bytes, 24u);
  float last = 0.0f;
  std::memcpy(&last, a.data + 20, sizeof(last));
  EXPECT_EQ(last, 1.0f + 5.0f / 8.0f);
  EXPECT_EQ(entries.at("flags").dtype, DType::kUnspecified);
  EXPECT_EQ(entries.at("flags").dtype_name, "BOOL");
  EXPECT_TRUE(entries.at("scalar").shape.empty());
  EXPECT_EQ(entries.at("scalar").bytes, 4u);
  EXPECT_EQ(entries.at("empty").bytes, 0u);
  EXPECT_EQ(entries.at("odd").dtype, DType::kBFloat16);
}

TEST(Safetensors, AcceptsWhatTheFormatAllows) {
  EXPECT_TRUE(OpenBytes(WithHeader("{}", "")).ok());
  EXPECT_TRUE(OpenBytes(WithHeader("{}      ", "")).ok());  // padding
  EXPECT_TRUE(OpenBytes(WithHeader(R"({"__metadata__":{"a":"b","c":""}})", "")).ok());
  // Any order in the header, and subbyte types that fill whole bytes.
  EXPECT_TRUE(OpenBytes(WithHeader(R"({"b":{"data_offsets":[1,2],"shape":[2],"dtype":"F4"},)"
                                   R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                                   "xy"))
                  .ok());
  // Rank 8 is the largest.
  EXPECT_TRUE(
      OpenBytes(
          WithHeader(R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1],"data_offsets":[0,1]}})", "x"))
          .ok());
}

struct BadFile {
  const char* name;
  std::string bytes;
  const char* text;  // must occur in the message
};

std::string One(const std::string& tensor, const std::string& data = "0123") {
  return WithHeader(R"({"t.w":)" + tensor + "}", data);
}

std::string Two(const std::string& first_offsets, const std::string& second_offsets) {
  return WithHeader(R"({"t.v":{"dtype":"U8","shape":[2],"data_offsets":)" + first_offsets +
                        R"(},"t.w":{"dtype":"U8","shape":[2],"data_offsets":)" + second_offsets +
                        "}}",
                    "0123");
}

std::string LengthOnly(std::uint64_t length, const std::string& rest) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + rest;
}

std::vector<BadFile> BadFiles() {
  const std::string deep(100'000, '[');
  return {
      {"empty", "", "0 bytes"},
      {"shorter_than_a_length", "1234567", "7 bytes"},
      {"header_of_zero_bytes", LengthOnly(0, "{}"), "begin with {"},
      {"header_one_byte_too_long", LengthOnly(3, "{}"), "header has 3 bytes"},
      {"header_of_2_to_the_63", LengthOnly(std::uint64_t{1} << 63, "{}"), "9223372036854775808"},
      {"header_of_all_ones", LengthOnly(~std::uint64_t{0}, "{}"), "18446744073709551615"},
      {"header_over_the_limit",
       LengthOnly(100'000'001, "{}" + std::string(100'000'001, ' ')),  // NOLINT: it is meant
       "100000000"},
      {"not_json", WithHeader("{tensor}", ""), "not JSON"},
      {"truncated_json", WithHeader(R"({"t.w":{"dtype":"U8",)", ""), "not JSON"},
      {"two_documents", WithHeader("{}{}", ""), "not JSON"},
      {"text_after_a_nul", WithHeader(std::string("{}\0junk", 7), ""), "NUL"},
      {"leading_space", WithHeader(" {}", ""), "begin with {"},
      {"byte_order_mark", WithHeader("\xEF\xBB\xBF{}", ""), "begin with {"},
      {"array_on_top", WithHeader("[]", ""), "begin with {"},
      {"bad_utf8", WithHeader("{\"\xFF\":{}}", ""), "not JSON"},
      {"nested_at_the_top", WithHeader(R"({"t.w":)" + deep, ""), "t.w"},
      {"nested_in_a_shape", One(R"({"dtype":"U8","shape":)" + deep), "t.w"},
      {"nested_objects", One(R"({"dtype":{"a":{"a":{)"), "t.w"},
      {"nested_in_metadata", WithHeader(R"({"__metadata__":{"a":{)", ""), "__metadata__"},
      {"tensor_is_a_number", One("1"), "t.w"},
      {"tensor_is_null", One("null"), "t.w"},
      {"tensor_is_a_string", One(R"("x")"), "t.w"},
      {"metadata_is_a_number", WithHeader(R"({"__metadata__":{"a":1}})", ""), "__metadata__"},
      {"unknown_dtype", One(R"({"dtype":"F33","shape":[1],"data_offsets":[0,4]})"), "F33"},
      {"dtype_is_a_number", One(R"({"dtype":4,"shape":[1],"data_offsets":[0,4]})"), "t.w"},
      {"no_dtype", One(R"({"shape":[1],"data_offsets":[0,4]})"), "no dtype"},
      {"no_shape", One(R"({"dtype":"F32","data_offsets":[0,4]})"), "no shape"},
      {"no_offsets", One(R"({"dtype":"F32","shape":[1]})"), "no data_offsets"},
      {"unknown_field", One(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1})"), "\"x\""},
      {"one_offset", One(R"({"dtype":"F32","shape":[1],"data_offsets":[0]})"), "t.w"},
      {"three_offsets", One(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,4]})"), "t.w"},
      {"negative_offset", One(R"({"dtype":"F32","shape":[1],"data_offsets":[-4,0]})"), "negative"},
      {"negative_zero", One(R"({"dtype":"F32","shape":[1],"data_offsets":[-0,4]})"), "negative"},
      {"fractional_offset", One(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4.0]})"), "t.w"},
      {"string_offset", One(R"({"dtype":"F32","shape":[1],"data_offsets":[0,"4"]})"), "t.w"},
      {"fractional_extent", One(R"({"dtype":"F32","shape":[1e0],"data_offsets":[0,4]})"), "t.w"},
      {"negative_extent", One(R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})"), "t.w"},
      {"shape_is_a_number", One(R"({"dtype":"F32","shape":1,"data_offsets":[0,4]})"), "t.w"},
      {"rank_9", One(R"({"dtype":"U8","shape":[1,1,1,1,1,1,1,1,4],"data_offsets":[0,4]})"), "t.w"},
      {"offsets_reversed", One(R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})"), "[4, 0]"},
      {"offsets_beyond_the_data", One(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})"),
       "[0, 8]"},
      {"offset_beyond_64_bits",
       One(R"({"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551620]})"), "t.w"},
      {"offset_of_64_bits",
       One(R"({"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]})"), "t.w"},
      {"shape_too_small", One(R"({"dtype":"U8","shape":[3],"data_offsets":[0,4]})"), "needs 3"},
      {"shape_too_large", One(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})"), "needs 8"},
      {"extent_of_64_bits",
       One(R"({"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,4]})"), "t.w"},
      // 2^32 * 2^32 is 0 in 64 bits, 2^62 * 4 + ... wraps to small sizes.
      {"product_that_wraps_to_0",
       One(R"({"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]})", ""), "t.w"},
      {"bits_that_wrap",
       One(R"({"dtype":"F32","shape":[576460752303423489],"data_offsets":[0,4]})"), "t.w"},
      {"half_a_byte", One(R"({"dtype":"F4","shape":[1],"data_offsets":[0,0]})", ""), "t.w"},
      {"overlap", Two("[0,2]", "[1,3]"), "overlaps"},
      {"same_place", Two("[0,2]", "[0,2]"), "overlaps"},
      {"hole_before", Two("[1,3]", "[3,5]"), "t.w"},
      {"hole_between",
       WithHeader(R"({"t.v":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                  R"("t.w":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                  "0123"),
       "hole"},
      {"data_after_the_last", One(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})", "01234"),
       "1 bytes after"},
      {"data_without_tensors", WithHeader("{}", "x"), "1 bytes after"},
      {"truncated_data", One(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})", "012"), "t.w"},
      {"tensor_twice",
       WithHeader(R"({"t.w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)"
                  R"("t.w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
                  ""),
       "\"t.w\" occurs twice"},
      {"field_twice", One(R"({"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]})"),
       "\"dtype\" twice"},
      {"metadata_name_twice", WithHeader(R"({"__metadata__":{"a":"","a":""}})", ""), "twice"},
      {"metadata_twice", WithHeader(R"({"__metadata__":{},"__metadata__":{}})", ""), "twice"},
      {"long_name", WithHeader("{\"" + std::string(5000, 'n') + "\":{}}", ""), "long name"},
      {"escaped_name", WithHeader(R"({"a\nb":1})", ""), R"(a\nb)"},
  };
}

class BadSafetensors : public ::testing::TestWithParam<BadFile> {};

TEST_P(BadSafetensors, IsRefused) {
  const auto file = OpenBytes(GetParam().bytes);
  ASSERT_FALSE(file.ok());
  EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorReason(file.status()), "BAD_SAFETENSORS");
  EXPECT_TRUE(Contains(file.status(), GetParam().text)) << file.status().message();
  EXPECT_TRUE(Contains(file.status(), "weights file")) << file.status().message();
  EXPECT_FALSE(Contains(file.status(), "attnd_test_")) << "the path is in the text";
  EXPECT_LT(file.status().message().size(), 500u);
}

INSTANTIATE_TEST_SUITE_P(All, BadSafetensors, ::testing::ValuesIn(BadFiles()),
                         [](const auto& test) { return std::string(test.param.name); });

// Every prefix of a good file, and every single byte of its header changed, must end in a status.
TEST(Safetensors, SurvivesCutsAndChangedBytes) {
  const std::string good = SafetensorsBytes({FloatTensor("a", {2}), FloatTensor("b", {1, 2})});
  for (std::size_t length = 0; length < good.size(); ++length) {
    EXPECT_FALSE(OpenBytes(good.substr(0, length)).ok()) << length;
  }
  for (std::size_t i = 0; i + 16 < good.size(); ++i) {
    for (char change : {'\x01', '\x20', '\x7f'}) {
      std::string bytes = good;
      bytes[i] = static_cast<char>(bytes[i] ^ change);
      const auto file = OpenBytes(bytes);
      if (file.ok()) continue;  // a letter of a name, for instance
      EXPECT_EQ(ErrorReason(file.status()), "BAD_SAFETENSORS");
    }
  }
}

TEST(Safetensors, RefusesWhatIsNoRegularFile) {
  const TemporaryDirectory directory;
  ASSERT_EQ(mkfifo((directory / "fifo").c_str(), 0600), 0);
  for (const std::string& path : {directory.path(), directory / "fifo", directory / "missing",
                                  std::string("/dev/zero"), std::string()}) {
    const auto file = SafetensorsFile::Open(path, "weights file");
    ASSERT_FALSE(file.ok()) << path;
    EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(ErrorReason(file.status()), "BAD_SAFETENSORS");
    EXPECT_FALSE(Contains(file.status(), "attnd_test_")) << file.status().message();
  }
}

}  // namespace
}  // namespace attn
