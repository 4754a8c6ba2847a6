#include "client/cpp/npy.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "client/cpp/tensors.h"

namespace attn::client {
namespace {

using attention::v1::Tensor;

template <typename T>
std::string Bytes(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// A file of the given format version whose header's text is `dict`, without padding.
std::string File(const std::string& dict, const std::string& data, char version = 1) {
  std::string file = std::string("\x93NUMPY") + version + '\0';
  for (int i = 0; i < (version == 1 ? 2 : 4); ++i) {
    file.push_back(static_cast<char>(dict.size() >> (8 * i)));
  }
  return file + dict + data;
}

std::string Dict(const std::string& descr, const std::string& shape) {
  return "{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }";
}

TEST(ParseNpyTest, AFileThatNumPyWrote) {
  // numpy.save of ml_dtypes.bfloat16 [0, 1, 2], byte by byte.
  std::string file =
      std::string("\x93NUMPY\x01\x00v\x00", 10) + Dict("<V2", "(3,)") + std::string(60, ' ') + '\n';
  ASSERT_EQ(file.size(), 128u);
  file += std::string("\x00\x00\x80\x3f\x00\x40", 6);
  const auto npy = ParseNpy(file, "b.npy");
  ASSERT_TRUE(npy.ok()) << npy.status();
  EXPECT_EQ(npy->tensor.dtype(), attention::v1::DATA_TYPE_BFLOAT16);
  EXPECT_EQ(ShapeText(npy->tensor), "[3]");
  const auto floats = ConvertFloating(npy->tensor, attention::v1::DATA_TYPE_FLOAT32);
  ASSERT_TRUE(floats.ok());
  EXPECT_EQ(floats->data(), Bytes<float>({0, 1, 2}));
  // What is written is the same file again.
  EXPECT_EQ(NpyHeader(npy->tensor).value() + npy->tensor.data(), file);
}

TEST(ParseNpyTest, EveryVersionAndType) {
  const std::vector<std::pair<std::string, attention::v1::DataType>> types = {
      {"<f4", attention::v1::DATA_TYPE_FLOAT32},      {"<f2", attention::v1::DATA_TYPE_FLOAT16},
      {"<i8", attention::v1::DATA_TYPE_INT64},        {"<i4", attention::v1::DATA_TYPE_INT32},
      {"|b1", attention::v1::DATA_TYPE_BOOL},         {"|V2", attention::v1::DATA_TYPE_BFLOAT16},
      {"bfloat16", attention::v1::DATA_TYPE_BFLOAT16}};
  for (const char version : {'\1', '\2', '\3'}) {
    for (const auto& [descr, dtype] : types) {
      const std::string data(static_cast<size_t>(6 * ElementSize(dtype)), '\1');
      const auto npy = ParseNpy(File(Dict(descr, "(2, 3)"), data, version), "a.npy");
      ASSERT_TRUE(npy.ok()) << npy.status();
      EXPECT_EQ(npy->tensor.dtype(), dtype);
      EXPECT_EQ(ShapeText(npy->tensor), "[2, 3]");
      EXPECT_EQ(npy->tensor.data(), data);
      EXPECT_EQ(npy->note, "");
    }
  }
}

TEST(ParseNpyTest, DoublesAreRoundedAndSaidSo) {
  const std::string data = Bytes<double>({1.0 / 3, -1e300});
  const auto npy = ParseNpy(File(Dict("<f8", "(2,)"), data), "a.npy");
  ASSERT_TRUE(npy.ok()) << npy.status();
  EXPECT_EQ(npy->tensor.dtype(), attention::v1::DATA_TYPE_FLOAT32);
  EXPECT_EQ(npy->tensor.data(), Bytes<float>({1.0f / 3, -std::numeric_limits<float>::infinity()}));
  EXPECT_NE(npy->note.find("float64"), std::string::npos);
}

TEST(ParseNpyTest, ScalarsAndEmptyArrays) {
  EXPECT_TRUE(ParseNpy(File(Dict("<f4", "()"), "abcd"), "a").ok());
  EXPECT_TRUE(ParseNpy(File(Dict("<f4", "(0, 9223372036854775807)"), ""), "a").ok());
}

// What is wrong with a file, and a word that the message must have for its reader.
struct BadFile {
  std::string why;
  std::string file;
  std::string word;
};

std::vector<BadFile> BadFiles() {
  const std::string good = File(Dict("<f4", "(1,)"), "abcd");
  std::string lying_length = good;
  lying_length[8] = '\xff';
  std::string huge_length = File(Dict("<f4", "(1,)"), "abcd", 2);
  huge_length[11] = '\x7f';
  return {
      {"empty", "", "not a .npy"},
      {"another kind of file", "PK\3\4 an npz archive", "not a .npy"},
      {"cut within the prefix", good.substr(0, 9), "not a .npy"},
      {"cut within the header", good.substr(0, 40), "header"},
      {"version 4", File(Dict("<f4", "(1,)"), "abcd", 4), "version 4"},
      {"header longer than the file", lying_length, "header of"},
      {"header of 2 GiB", huge_length, "header of"},
      {"data too short", good.substr(0, good.size() - 1), "takes 4 bytes, and 3"},
      {"data too long", good + "x", "takes 4 bytes, and 5"},
      {"terabytes of data that are not there", File(Dict("<f4", "(1099511627776,)"), ""), "takes"},
      {"a product beyond 2^63", File(Dict("<f4", "(4294967296, 4294967296)"), ""), "2^63"},
      {"a dimension beyond 2^63", File(Dict("<f4", "(9223372036854775808,)"), ""), "dimension"},
      {"a negative dimension", File(Dict("<f4", "(-1,)"), ""), "dimension"},
      {"a dimension that is no number", File(Dict("<f4", "(None,)"), ""), "dimension"},
      {"a shape without an end", File("{'descr': '<f4', 'shape': (1,", ""), "dimension"},
      {"65 dimensions",
       File(Dict(
                "<f4", "(" +
                           [] {
                             std::string ones;
                             for (int i = 0; i < 65; ++i) ones += "1, ";
                             return ones;
                           }() +
                           ")"),
            "abcd"),
       "64 dimensions"},
      {"objects", File(Dict("|O", "(1,)"), "abcdefgh"), "object"},
      {"big-endian", File(Dict(">f4", "(1,)"), "abcd"), "astype('<f4')"},
      {"complex", File(Dict("<c8", "(1,)"), "abcdefgh"), "'<c8'"},
      {"structured",
       File("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", "abcd"),
       "structured"},
      {"Fortran order",
       File("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 1), }", "abcdefgh"),
       "ascontiguousarray"},
      {"a key twice", File("{'descr': '<f4', 'descr': '<f4', }", ""), "two keys"},
      {"an unknown key", File("{'code': 'import os', }", ""), "unknown key"},
      {"a key missing", File("{'descr': '<f4', 'fortran_order': False, }", ""), "missing"},
      {"text after the header", File(Dict("<f4", "(1,)") + " + x", "abcd"), "after"},
      {"no dict", File("[1, 2]", ""), "'{'"},
      {"a string without an end", File("{'descr': '<f4", ""), "does not end"},
      {"a NUL in the header", File(std::string("{\0'descr'", 9), ""), "header"},
  };
}

TEST(ParseNpyTest, HostileFilesAreRefusedWithTheReason) {
  for (const BadFile& bad : BadFiles()) {
    const auto npy = ParseNpy(bad.file, "bad.npy");
    ASSERT_FALSE(npy.ok()) << bad.why;
    EXPECT_EQ(npy.status().code(), absl::StatusCode::kInvalidArgument) << bad.why;
    const std::string message(npy.status().message());
    EXPECT_EQ(message.rfind("bad.npy: ", 0), 0u) << message;
    EXPECT_NE(message.find(bad.word), std::string::npos) << bad.why << ": " << message;
  }
}

// Any prefix, and any single byte changed, is read or refused: nothing else.
TEST(ParseNpyTest, NoDamageDoesMoreThanFail) {
  const std::string good = NpyHeader(FloatTensor({2, 3}, std::vector<float>(6))).value() +
                           std::string(6 * sizeof(float), '\0');
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_FALSE(ParseNpy(good.substr(0, size), "a").ok()) << size;
  }
  for (size_t at = 0; at < 128; ++at) {
    for (int byte = 0; byte < 256; ++byte) {
      std::string damaged = good;
      damaged[at] = static_cast<char>(byte);
      const auto npy = ParseNpy(damaged, "a");
      EXPECT_TRUE(!npy.ok() || CheckInlineTensor(npy->tensor).ok()) << at << " " << byte;
    }
  }
}

class NpyFileTest : public testing::Test {
 protected:
  NpyFileTest() {
    std::string pattern = (std::filesystem::temp_directory_path() / "npy_test.XXXXXX").string();
    folder_ = mkdtemp(pattern.data());
  }
  ~NpyFileTest() override { std::filesystem::remove_all(folder_); }
  std::string Path(const std::string& name) const { return folder_ + "/" + name; }

  std::string folder_;
};

TEST_F(NpyFileTest, WritesWhatItReads) {
  Tensor tensor = FloatTensor({1, 2, 2}, {1, 2, 3, 4});
  ASSERT_TRUE(WriteNpy(Path("a.npy"), tensor).ok());
  const auto npy = ReadNpy(Path("a.npy"));
  ASSERT_TRUE(npy.ok()) << npy.status();
  EXPECT_EQ(npy->tensor.SerializeAsString(), tensor.SerializeAsString());
  EXPECT_EQ(std::filesystem::file_size(Path("a.npy")) % 64, 16u);
}

TEST_F(NpyFileTest, RefusesWhatIsNoFileOrNoTensor) {
  EXPECT_EQ(ReadNpy(Path("none.npy")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(ReadNpy(folder_).ok());
  EXPECT_FALSE(WriteNpy(Path("no/such/folder.npy"), FloatTensor({1}, {1})).ok());
  Tensor tensor = FloatTensor({3}, {1, 2, 3});
  tensor.set_shape(0, 4);
  EXPECT_FALSE(WriteNpy(Path("b.npy"), tensor).ok());
  EXPECT_FALSE(std::filesystem::exists(Path("b.npy")));
}

}  // namespace
}  // namespace attn::client
