// BenchmarkAttention without a wire: its events, its one place, its executions in the queue behind
// requests. Runs under the thread sanitizer.
#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <thread>

#include "attention/v1/admin.pb.h"
#include "core/error.h"
#include "server/benchmark_runner.h"
#include "tests/server/server_fixture.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

proto::BenchmarkAttentionRequest Request(std::uint32_t iterations) {
  proto::BenchmarkAttentionRequest request;
  request.mutable_layer()->set_model("m");
  request.mutable_shape()->set_batch(1);
  request.mutable_shape()->set_q_len(20);
  request.mutable_shape()->set_kv_len(20);
  request.set_iterations(iterations);
  request.set_max_seconds(60.0);
  return request;
}

class BenchmarkTest : public ::testing::Test {
 protected:
  void SetUp() override {
    proto::LoadModelRequest load;
    *load.mutable_spec() = SpecOf("m", 4, 16);
    ASSERT_TRUE(Call(dispatcher_, rpcs::kLoadModel, load).status.ok());
  }

  // A benchmark that is under way: it has reported once.
  struct Running {
    std::shared_ptr<CallContext> context = std::make_shared<CallContext>();
    std::promise<void> reported;
    std::atomic<int> results{0};
    std::atomic<bool> any{false};
    std::future<Reply> reply;
  };
  std::shared_ptr<Running> Start(std::uint32_t iterations) {
    auto running = std::make_shared<Running>();
    running->context->send = [running = running.get()](const Answer& answer, bool) {
      std::string bytes;
      for (const AnswerPiece& piece : answer.pieces) {
        bytes.append(static_cast<const char*>(piece.data()), piece.size());
      }
      proto::BenchmarkAttentionResponse event;
      EXPECT_TRUE(event.ParseFromString(bytes));
      if (event.has_result()) ++running->results;
      if (!running->any.exchange(true)) running->reported.set_value();
    };
    running->reply = std::async(std::launch::async, [this, running, iterations] {
      return Call(dispatcher_, rpcs::kBenchmarkAttention,
                  BytesOf(Request(iterations).SerializeAsString()), running->context);
    });
    return running;
  }

  ServerState state_{SmallServer(), BuiltInImplementations()};
  Dispatcher dispatcher_{state_};
};

TEST_F(BenchmarkTest, SendsResultsAndRecordsThem) {
  const auto running = Start(2);
  EXPECT_TRUE(running->reply.get().status.ok());
  EXPECT_GE(running->results, 4);
  EXPECT_GE(state_.registry().timings().All().size(), 4u);
}

TEST_F(BenchmarkTest, OneAtATimeUntilItIsCancelled) {
  const auto running = Start(100000);
  running->reported.get_future().wait();
  const Reply refused = Call(dispatcher_, rpcs::kBenchmarkAttention, Request(1));
  EXPECT_EQ(refused.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(refused.status), "BENCHMARK_RUNNING");
  EXPECT_GT(RetryDelay(refused.status), 0.0);
  // Requests are served meanwhile.
  for (unsigned i = 0; i < 50; ++i) {
    EXPECT_TRUE(Call(dispatcher_, rpcs::kAttend, RandomAttend(i)).status.ok());
  }
  running->context->Cancel();
  EXPECT_EQ(running->reply.get().status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(running->results, 0);
  EXPECT_TRUE(Call(dispatcher_, rpcs::kBenchmarkAttention, Request(1)).status.ok());
}

TEST_F(BenchmarkTest, ClosingTheSeatEndsItAndLetsNoOtherIn) {
  const auto running = Start(100000);
  running->reported.get_future().wait();
  state_.benchmark_seat().Close();
  EXPECT_EQ(ErrorReason(running->reply.get().status), "DRAINING");
  EXPECT_EQ(ErrorReason(Call(dispatcher_, rpcs::kBenchmarkAttention, Request(1)).status),
            "DRAINING");
}

class QueueRunnerTest : public ::testing::Test {
 protected:
  // The queue goes before its executor: nothing may be left to run.
  void TearDown() override {
    stop_ = true;
    do {
      executor_.Run([] {});  // what ran when it was told to stop may have pushed once more
      executor_.Run([] {});
    } while (queue_.size() > 0);
  }
  // Keeps the driver busy until it is opened.
  void Block() {
    executor_.Post([this] { gate_.get_future().wait(); });
  }
  // A job that posts itself again until it is told to stop: the queue is never empty.
  void PushEndless() {
    DeviceQueue::Job job;
    job.call = std::make_shared<CallContext>();
    job.run = [this] {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (!stop_) PushEndless();
    };
    job.drop = [](const absl::Status&) {};
    EXPECT_TRUE(queue_.Push(std::move(job)).ok());
  }

  std::promise<void> gate_;
  std::atomic<bool> stop_{false};
  Executor executor_{Executor::Options{}};
  DeviceQueue queue_{"test", executor_, 8};
  std::shared_ptr<CallContext> call_ = std::make_shared<CallContext>();
  QueueRunner runner_{queue_, call_};
};

TEST_F(QueueRunnerTest, RunsAJobOnTheDriver) {
  bool on_driver = false;
  EXPECT_TRUE(
      runner_
          .Execute([&](const bool*) { on_driver = executor_.OnDriver(); }, Clock::time_point::max())
          .ok());
  EXPECT_TRUE(on_driver);
}

TEST_F(QueueRunnerTest, AdvancesInAQueueThatIsNeverEmpty) {
  PushEndless();
  PushEndless();
  bool ran = false;
  const absl::Status status =
      runner_.Execute([&](const bool*) { ran = true; }, Clock::now() + std::chrono::seconds(30));
  stop_ = true;
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_TRUE(ran);
}

TEST_F(QueueRunnerTest, AJobThatWaitsIsGivenUpAtTheDeadlineAndWhenCancelled) {
  Block();
  bool ran = false;
  const auto job = [&](const bool*) { ran = true; };
  EXPECT_TRUE(
      absl::IsDeadlineExceeded(runner_.Execute(job, Clock::now() + std::chrono::milliseconds(20))));
  std::future<absl::Status> waiting = std::async(
      std::launch::async, [&] { return runner_.Execute(job, Clock::time_point::max()); });
  while (queue_.size() == 0) std::this_thread::yield();
  call_->Cancel();
  EXPECT_TRUE(absl::IsCancelled(waiting.get()));
  EXPECT_TRUE(absl::IsCancelled(runner_.Execute(job, Clock::time_point::max())));
  EXPECT_TRUE(absl::IsCancelled(runner_.PauseUntil(Clock::now() + std::chrono::hours(1))));
  gate_.set_value();
  executor_.Run([] {});
  EXPECT_FALSE(ran);
}

TEST_F(QueueRunnerTest, AJobThatRunsIsToldToStop) {
  const auto job = [&](const bool* stop) {
    while (!__atomic_load_n(stop, __ATOMIC_RELAXED)) std::this_thread::yield();
  };
  EXPECT_TRUE(
      absl::IsDeadlineExceeded(runner_.Execute(job, Clock::now() + std::chrono::milliseconds(20))));
}

}  // namespace
}  // namespace attn::server
