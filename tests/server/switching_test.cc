// Threads that call while others switch: no call fails, every answer is right. Runs under the
// thread sanitizer.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <thread>

#include "attention/v1/admin.pb.h"
#include "tests/server/server_fixture.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

TEST(SwitchingTest, NoCallFailsAndEveryAnswerIsRightWhileImplementationsChange) {
  constexpr int kClients = 2;
  constexpr int kCallsEach = 1000;
  ServerState state(SmallServer(), BuiltInImplementations());
  Dispatcher dispatcher(state);
  proto::LoadModelRequest load;
  *load.mutable_spec() = SpecOf("m", 4, 16);
  ASSERT_TRUE(Call(dispatcher, rpcs::kLoadModel, load).status.ok());

  proto::AttendRequest request = RandomAttend(1);
  request.mutable_layer()->set_model("m");
  request.mutable_execution()->set_implementation("standard");
  const std::vector<float> expected =
      ValuesOf(Call(dispatcher, rpcs::kAttend, request).As<proto::AttendResponse>().output());
  ASSERT_FALSE(expected.empty());
  request.clear_execution();
  const std::string bytes = request.SerializeAsString();

  std::atomic<int> failed{0};
  std::atomic<int> wrong{0};
  std::atomic<int> by_standard{0};
  std::atomic<int> running{kClients};
  std::vector<std::thread> threads;
  for (int client = 0; client < kClients; ++client) {
    threads.emplace_back([&] {
      for (int i = 0; i < kCallsEach; ++i) {
        const Reply reply = Call(dispatcher, rpcs::kAttend, BytesOf(bytes));
        if (!reply.status.ok()) ++failed;
        const auto response = reply.As<proto::AttendResponse>();
        const std::vector<float> values = ValuesOf(response.output());
        bool close = values.size() == expected.size();
        for (std::size_t j = 0; close && j < values.size(); ++j)
          close = std::abs(values[j] - expected[j]) < 1e-5f;
        if (!close) ++wrong;
        if (response.execution().implementation() == "standard") ++by_standard;
      }
      --running;
    });
  }
  threads.emplace_back([&] {
    proto::SwitchAttentionRequest change;
    change.set_model("m");
    for (int i = 0; running > 0; ++i) {
      change.set_implementation(i % 2 == 0 ? "standard" : "torch_sdpa");
      if (!Call(dispatcher, rpcs::kSwitchAttention, change).status.ok()) ++failed;
      // Others read the state meanwhile.
      Call(dispatcher, rpcs::kListModels, proto::ListModelsRequest());
      StateCollector(state).Collect();
      state.metrics().registry()->Collect();
    }
  });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(by_standard, 0);
  EXPECT_LT(by_standard, kClients * kCallsEach);
}

TEST(SwitchingTest, ModelsComeAndGoUnderLoad) {
  ServerState state(SmallServer(), BuiltInImplementations());
  Dispatcher dispatcher(state);
  std::atomic<bool> stop{false};
  std::atomic<int> unexpected{0};
  proto::AttendRequest request = RandomAttend(2);
  request.mutable_layer()->set_model("m");
  const std::string bytes = request.SerializeAsString();
  std::vector<std::thread> threads;
  for (int client = 0; client < 2; ++client) {
    threads.emplace_back([&] {
      while (!stop) {
        const absl::StatusCode code = Call(dispatcher, rpcs::kAttend, BytesOf(bytes)).status.code();
        if (code != absl::StatusCode::kOk && code != absl::StatusCode::kNotFound) ++unexpected;
      }
    });
  }
  proto::LoadModelRequest load;
  *load.mutable_spec() = SpecOf("m", 4, 16);
  proto::UnloadModelRequest unload;
  unload.set_model("m");
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(Call(dispatcher, rpcs::kLoadModel, load).status.ok());
    EXPECT_TRUE(Call(dispatcher, rpcs::kUnloadModel, unload).status.ok());
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(unexpected, 0);
}

}  // namespace
}  // namespace attn::server
