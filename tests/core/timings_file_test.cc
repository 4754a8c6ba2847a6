// The timings file: what is written is read again, and what is foreign or broken is not.
#include "core/timings_file.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "core/error.h"

namespace attn {
namespace {

const TimingsKey kKey = {"a CPU, avx2, 2 threads", "1.0"};

MeasuredTiming Timing(const std::string& implementation, std::int64_t kv_len) {
  MeasuredTiming timing;
  timing.implementation = implementation;
  timing.seconds = 1.25e-4;
  AttentionShape& shape = timing.shape;
  shape.batch = 2;
  shape.num_heads = 8;
  shape.num_kv_heads = 2;
  shape.head_dim = 64;
  shape.value_dim = 80;
  shape.q_len = 5;
  shape.kv_len = kv_len;
  shape.pairs = 2 * 5 * kv_len;
  shape.dtype = DType::kBFloat16;
  shape.kv_dtype = DType::kInt8;
  shape.paged = true;
  shape.is_causal = true;
  shape.window_left = 100;
  shape.mask = kernels::MaskType::kBool;
  shape.rows = {{5, kv_len, kv_len - 5}, {5, kv_len, -3}};
  return timing;
}

class TimingsFileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "timings_XXXXXX";
    folder_ = mkdtemp(pattern.data());
    path_ = folder_ + "/timings.json";
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  void Write(const std::string& text) { std::ofstream(path_) << text; }
  std::string Read() const {
    std::ifstream file(path_);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }
  std::string Reason(const TimingsKey& key = kKey) {
    MeasuredTimings read;
    const auto count = LoadTimings(path_, key, read);
    EXPECT_FALSE(count.ok());
    EXPECT_TRUE(read.All().empty());
    return ErrorReason(count.status());
  }
  void Save() {
    MeasuredTimings timings;
    timings.Record(Timing("flash", 70));
    timings.Record(Timing("standard", 90));
    ASSERT_TRUE(SaveTimings(path_, kKey, timings).ok());
  }

  std::string folder_;
  std::string path_;
};

TEST_F(TimingsFileTest, WhatIsWrittenIsReadAgain) {
  Save();
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 1);
  MeasuredTimings read;
  const auto count = LoadTimings(path_, kKey, read);
  ASSERT_TRUE(count.ok()) << count.status();
  EXPECT_EQ(*count, 2u);
  const std::vector<MeasuredTiming> all = read.All();
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[1].implementation, "standard");
  EXPECT_EQ(all[0].seconds, 1.25e-4);
  EXPECT_EQ(all[0].shape.rows[1].first_query_position, -3);
  EXPECT_EQ(all[0].shape.window_right, -1);
  // The same shape to those who compare: it replaces the one that was read.
  read.Record(Timing("flash", 70));
  EXPECT_EQ(read.All().size(), 2u);
}

TEST_F(TimingsFileTest, AFileThatIsNotThereIsNoFault) {
  MeasuredTimings read;
  EXPECT_TRUE(absl::IsNotFound(LoadTimings(path_, kKey, read).status()));
}

TEST_F(TimingsFileTest, OtherHardwareAndOtherVersionsAreIgnored) {
  Save();
  EXPECT_EQ(Reason({"another CPU", kKey.version}), "TIMINGS_OF_ANOTHER");
  EXPECT_EQ(Reason({kKey.hardware, "1.1"}), "TIMINGS_OF_ANOTHER");
}

TEST_F(TimingsFileTest, BrokenFilesAreRefusedWhole) {
  Save();
  const std::string good = Read();
  Write(good.substr(0, good.size() / 2));
  EXPECT_EQ(Reason(), "BROKEN_TIMINGS");
  Write("");
  EXPECT_EQ(Reason(), "BROKEN_TIMINGS");
  Write("[1, 2]");
  EXPECT_EQ(Reason(), "BROKEN_TIMINGS");
  const std::pair<const char*, const char*> changes[] = {
      {"\"seconds\": 0.000125", "\"seconds\": -1"},
      {"\"seconds\": 0.000125", "\"seconds\": \"fast\""},
      {"\"batch\": 2", "\"batch\": 2.5"},
      {"\"batch\": 2", "\"batch\": 99999999999999999999"},
      {"\"dtype\": 3", "\"dtype\": 99"},
      {"\"paged\": true", "\"paged\": 1"},
      {"\"rows\"", "\"columns\""},
      {"\"timings\"", "\"others\""},
      {"\"format\"", "\"shape\""},
  };
  for (const auto& [from, to] : changes) {
    std::string text = good;
    const std::size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    text.replace(at, std::string(from).size(), to);
    Write(text);
    EXPECT_EQ(Reason(), "BROKEN_TIMINGS") << to;
  }
}

TEST_F(TimingsFileTest, AFolderThatIsNotThereIsAnErrorOfTheSaving) {
  path_ = folder_ + "/none/timings.json";
  MeasuredTimings timings;
  const absl::Status saved = SaveTimings(path_, kKey, timings);
  EXPECT_EQ(ErrorReason(saved), "TIMINGS_NOT_WRITTEN");
}

}  // namespace
}  // namespace attn
