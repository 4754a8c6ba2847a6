// Calls through the dispatcher, without gRPC: decoding, limits, errors, queue, drain.
#include "server/dispatcher.h"

#include <gtest/gtest.h>

#include <cmath>
#include <future>
#include <limits>

#include "attention/v1/admin.pb.h"
#include "core/error.h"
#include "tests/server/server_fixture.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

class DispatcherTest : public testing::Test {
 protected:
  absl::StatusCode CodeOf(const proto::AttendRequest& request) {
    return Call(dispatcher_, rpcs::kAttend, request).status.code();
  }
  std::string FieldOf(const proto::AttendRequest& request) {
    return ErrorDetailsOf(Call(dispatcher_, rpcs::kAttend, request).status)["field"];
  }
  absl::Status Load(const proto::ModelSpec& spec) {
    proto::LoadModelRequest request;
    *request.mutable_spec() = spec;
    return Call(dispatcher_, rpcs::kLoadModel, request).status;
  }

  // A job in front of all others that waits, so that calls stay in the queue.
  std::promise<void> BlockDevice() {
    std::promise<void> release;
    std::promise<void> blocked;
    auto call = std::make_shared<CallContext>();
    const absl::Status pushed =
        state_.queues().front()->Push({call, 0,
                                       [&blocked, wait = release.get_future().share()] {
                                         blocked.set_value();
                                         wait.wait();
                                       },
                                       [](absl::Status) {}});
    EXPECT_TRUE(pushed.ok());
    blocked.get_future().wait();
    return release;
  }

  ServerState state_{SmallServer(), BuiltInImplementations()};
  Dispatcher dispatcher_{state_};
};

TEST_F(DispatcherTest, AnswersAttendWithTensorsAndFacts) {
  const Reply reply = Call(dispatcher_, rpcs::kAttend, RandomAttend(1));
  ASSERT_TRUE(reply.status.ok()) << reply.status;
  const auto response = reply.As<proto::AttendResponse>();
  EXPECT_EQ(response.output().shape_size(), 4);
  EXPECT_EQ(response.output().data().size(), 2u * 4 * 9 * 16 * sizeof(float));
  for (float value : ValuesOf(response.output())) EXPECT_TRUE(std::isfinite(value));
  EXPECT_FALSE(response.has_attention_weights());
  EXPECT_FALSE(response.execution().implementation().empty());
  EXPECT_FALSE(response.execution().reason().empty());
  EXPECT_GT(response.execution().flops(), 0u);
}

TEST_F(DispatcherTest, GathersSlicedMessages) {
  const std::string bytes = RandomAttend(2).SerializeAsString();
  const Reply whole = Call(dispatcher_, rpcs::kAttend, BytesOf(bytes));
  const Reply sliced = Call(dispatcher_, rpcs::kAttend, BytesOf(bytes, 61));
  ASSERT_TRUE(sliced.status.ok()) << sliced.status;
  EXPECT_EQ(ValuesOf(whole.As<proto::AttendResponse>().output()),
            ValuesOf(sliced.As<proto::AttendResponse>().output()));
}

TEST_F(DispatcherTest, RefusesMalformedMessages) {
  const std::string good = RandomAttend(3).SerializeAsString();
  for (const std::string& bytes :
       {good.substr(0, good.size() - 1), good.substr(0, good.size() / 2),
        good + std::string(1, '\x0a'), std::string(64, '\xff'), std::string("\x0b")}) {
    const Reply reply = Call(dispatcher_, rpcs::kAttend, BytesOf(bytes));
    EXPECT_EQ(reply.status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(ErrorReason(reply.status), "MALFORMED_MESSAGE");
  }
}

TEST_F(DispatcherTest, RefusesAMillionEmptyEntries) {
  std::string bytes;
  for (int i = 0; i < 1000000; ++i)
    bytes += std::string("\x5a\x00", 2);  // past_key_value, empty, again and again
  EXPECT_EQ(ErrorReason(Call(dispatcher_, rpcs::kAttend, BytesOf(bytes)).status),
            "TOO_MANY_ENTRIES");
  std::string packed;  // query_lengths with a million zeros
  packed += std::string("\x32\xc0\x84\x3d", 4) + std::string(1000000, '\0');
  EXPECT_EQ(ErrorReason(Call(dispatcher_, rpcs::kAttend, BytesOf(packed)).status),
            "TOO_MANY_ENTRIES");
}

TEST_F(DispatcherTest, NamesTheFieldThatIsWrong) {
  proto::AttendRequest request = RandomAttend(4);
  request.mutable_query()->set_shape(0, -1);
  EXPECT_EQ(FieldOf(request), "query");
  request = RandomAttend(4);
  request.mutable_key()->set_shape(0, std::int64_t{1} << 62);
  request.mutable_key()->set_shape(1, std::int64_t{1} << 62);
  EXPECT_EQ(FieldOf(request), "key");
  request = RandomAttend(4);
  request.mutable_value()->mutable_data()->push_back('x');
  EXPECT_EQ(FieldOf(request), "value");
  request = RandomAttend(4);
  request.mutable_value()->set_dtype(proto::DATA_TYPE_FLOAT16);
  EXPECT_EQ(CodeOf(request), absl::StatusCode::kInvalidArgument);
  request = RandomAttend(4);
  *request.mutable_attention_mask() = MakeTensor({2, 5}, std::vector<float>(10));
  EXPECT_EQ(FieldOf(request), "attention_mask");
  request = RandomAttend(4);
  request.mutable_options()->set_scale(std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(FieldOf(request), "options.scale");
  request = RandomAttend(4);
  request.mutable_options()->set_window_left(-2);
  EXPECT_EQ(FieldOf(request), "options.window_left");
  request = RandomAttend(4);
  request.add_query_lengths(3);
  EXPECT_EQ(FieldOf(request), "query_lengths");
  request = RandomAttend(4);
  request.clear_query();
  EXPECT_EQ(FieldOf(request), "query");
}

TEST_F(DispatcherTest, AnAnswerBeyondTheLargestMessageIsRefusedBeforeExecution) {
  proto::AttendRequest request = RandomAttend(5, 1, 1, 700, 1);
  request.set_output_attentions(true);  // 700 * 700 * 4 bytes
  EXPECT_EQ(ErrorReason(Call(dispatcher_, rpcs::kAttend, request).status), "ANSWER_TOO_LARGE");
}

TEST_F(DispatcherTest, WhatIsNotThereYetSaysSo) {
  proto::AttendRequest request = RandomAttend(6);
  request.mutable_query()->mutable_shared_memory()->set_region("r");
  EXPECT_EQ(CodeOf(request), absl::StatusCode::kUnimplemented);
  request = RandomAttend(6);
  request.mutable_results()->mutable_output()->set_region("r");
  EXPECT_EQ(CodeOf(request), absl::StatusCode::kUnimplemented);
  for (const Rpc* rpc : {&rpcs::kUnregisterSharedMemory, &rpcs::kRegisterSharedMemory}) {
    EXPECT_EQ(Call(dispatcher_, *rpc, BytesOf("")).status.code(), absl::StatusCode::kUnimplemented);
  }
}

TEST_F(DispatcherTest, AModelsLayerBindsHeadsDimensionsAndOptions) {
  proto::ModelSpec spec = SpecOf("m", 4, 16);
  spec.mutable_stacks(0)->mutable_self_attention(0)->mutable_options()->set_is_causal(true);
  ASSERT_TRUE(Load(spec).ok());
  EXPECT_EQ(Load(spec).code(), absl::StatusCode::kAlreadyExists);
  proto::AttendRequest request = RandomAttend(7);
  request.mutable_layer()->set_model("m");
  const Reply by_model = Call(dispatcher_, rpcs::kAttend, request);
  ASSERT_TRUE(by_model.status.ok()) << by_model.status;
  request.clear_layer();
  request.mutable_options()->set_is_causal(true);
  const Reply by_option = Call(dispatcher_, rpcs::kAttend, request);
  EXPECT_EQ(ValuesOf(by_model.As<proto::AttendResponse>().output()),
            ValuesOf(by_option.As<proto::AttendResponse>().output()));

  request = RandomAttend(7, 2, 2, 9, 16);
  request.mutable_layer()->set_model("m");
  EXPECT_EQ(CodeOf(request), absl::StatusCode::kInvalidArgument);
  request = RandomAttend(7);
  request.mutable_layer()->set_model("m");
  request.mutable_layer()->set_layer(1);
  EXPECT_EQ(CodeOf(request), absl::StatusCode::kNotFound);
  request.mutable_layer()->set_model("nobody");
  EXPECT_EQ(CodeOf(request), absl::StatusCode::kNotFound);
}

TEST_F(DispatcherTest, ForwardNeedsAModelWithWeights) {
  ASSERT_TRUE(Load(SpecOf("m", 4, 16)).ok());
  proto::ForwardRequest request;
  *request.mutable_hidden_states() = MakeTensor({1, 1, 64}, std::vector<float>(64));
  EXPECT_EQ(Call(dispatcher_, rpcs::kForward, request).status.code(),
            absl::StatusCode::kInvalidArgument);
  request.mutable_layer()->set_model("m");
  const absl::Status status = Call(dispatcher_, rpcs::kForward, request).status;
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ErrorReason(status), "MODEL_HAS_NO_WEIGHTS");
}

TEST_F(DispatcherTest, ANamedImplementationIsObeyedOrRefusedAndTheActiveOneGivesWay) {
  proto::AttendRequest request = RandomAttend(8);
  request.set_output_attentions(true);
  request.mutable_execution()->set_implementation("torch_sdpa");
  const absl::Status refused = Call(dispatcher_, rpcs::kAttend, request).status;
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ErrorDetailsOf(refused)["supporting"], "standard");

  proto::SwitchAttentionRequest change;
  change.set_implementation("torch_sdpa");
  ASSERT_TRUE(Call(dispatcher_, rpcs::kSwitchAttention, change).status.ok());
  request.clear_execution();
  const auto response = Call(dispatcher_, rpcs::kAttend, request).As<proto::AttendResponse>();
  EXPECT_EQ(response.execution().implementation(), "standard");
  EXPECT_NE(response.execution().reason().find("gave way"), std::string::npos);

  request.mutable_execution()->set_implementation("nothing");
  EXPECT_EQ(CodeOf(request), absl::StatusCode::kNotFound);
  request.mutable_execution()->set_implementation("standard");
  request.mutable_execution()->mutable_sparsity()->set_factor(0.5);
  EXPECT_EQ(CodeOf(request), absl::StatusCode::kInvalidArgument);
}

TEST_F(DispatcherTest, AFullQueueShedsAndTellsWhenToRetry) {
  std::promise<void> release = BlockDevice();
  std::vector<std::future<Reply>> waiting;
  const auto capacity = static_cast<int>(state_.limits().queue_capacity);
  for (int i = 0; i < capacity; ++i) {
    waiting.push_back(std::async(
        std::launch::async, [&] { return Call(dispatcher_, rpcs::kAttend, RandomAttend(9)); }));
  }
  while (state_.queues().front()->size() < state_.limits().queue_capacity)
    std::this_thread::yield();
  const absl::Status shed = Call(dispatcher_, rpcs::kAttend, RandomAttend(9)).status;
  EXPECT_EQ(shed.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GT(RetryDelay(shed), 0.0);
  release.set_value();
  for (std::future<Reply>& reply : waiting) EXPECT_TRUE(reply.get().status.ok());
}

TEST_F(DispatcherTest, WhatIsCancelledOrExpiredLeavesTheQueueUnexecuted) {
  std::promise<void> release = BlockDevice();
  auto cancelled = std::make_shared<CallContext>();
  std::future<Reply> first = std::async(std::launch::async, [&] {
    return Call(dispatcher_, rpcs::kAttend, BytesOf(RandomAttend(10).SerializeAsString()),
                cancelled);
  });
  while (state_.queues().front()->size() < 1) std::this_thread::yield();
  cancelled->Cancel();  // answered at once, while the device is still busy
  EXPECT_EQ(first.get().status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(state_.queues().front()->size(), 0u);

  auto expired = std::make_shared<CallContext>(Clock::now() + std::chrono::milliseconds(20));
  std::future<Reply> second = std::async(std::launch::async, [&] {
    return Call(dispatcher_, rpcs::kAttend, BytesOf(RandomAttend(10).SerializeAsString()), expired);
  });
  while (!expired->expired()) std::this_thread::yield();
  release.set_value();
  EXPECT_EQ(second.get().status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(expired->facts.executed);
}

TEST_F(DispatcherTest, TheBudgetOfBytesInFlightHolds) {
  absl::StatusOr<MemoryBudget::Reservation> most =
      state_.budget().Reserve(state_.limits().max_inflight_bytes - 1000);
  ASSERT_TRUE(most.ok());
  const absl::Status status = Call(dispatcher_, rpcs::kAttend, RandomAttend(11)).status;
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GT(RetryDelay(status), 0.0);
  *most = MemoryBudget::Reservation();
  EXPECT_TRUE(Call(dispatcher_, rpcs::kAttend, RandomAttend(11)).status.ok());
  while (state_.budget().used() != 0)
    std::this_thread::yield();  // given back when the call is gone
}

TEST_F(DispatcherTest, TheBudgetCountsAnAnswerUntilTheCallIsGone) {
  auto context = std::make_shared<CallContext>();
  ASSERT_TRUE(
      Call(dispatcher_, rpcs::kAttend, BytesOf(RandomAttend(13).SerializeAsString()), context)
          .status.ok());
  EXPECT_GT(state_.budget().used(), 0u);
  while (context.use_count() > 1) std::this_thread::yield();
  context.reset();
  EXPECT_EQ(state_.budget().used(), 0u);
}

TEST_F(DispatcherTest, HigherPrioritiesAreExecutedFirst) {
  std::promise<void> release = BlockDevice();
  std::vector<int> order;
  std::vector<std::shared_ptr<CallContext>> calls;
  for (const int priority : {0, 0, 5, -1, 5, 7}) {
    calls.push_back(std::make_shared<CallContext>());
    DeviceQueue::Job job;
    job.call = calls.back();
    job.priority = priority;
    job.run = [&order, priority, number = static_cast<int>(calls.size())] {
      order.push_back(priority * 10 + number);
    };
    ASSERT_TRUE(state_.queues().front()->Push(std::move(job)).ok());
  }
  release.set_value();
  Call(dispatcher_, rpcs::kAttend, RandomAttend(14));  // behind all of them but -1
  while (state_.queues().front()->size() > 0) std::this_thread::yield();
  Call(dispatcher_, rpcs::kAttend, RandomAttend(14));
  EXPECT_EQ(order, (std::vector<int>{76, 53, 55, 1, 2, -6}));
}

TEST_F(DispatcherTest, ALibrarysOwnMemoryIsLimitedToo) {
  ServerOptions options = SmallServer();
  options.limits.max_workspace_bytes = std::size_t{1} << 20;
  ServerState state(options, BuiltInImplementations());
  Dispatcher dispatcher(state);
  proto::AttendRequest request = RandomAttend(15, 1, 1, 3000, 1);
  request.mutable_options()->set_is_causal(true);
  request.mutable_options()->set_window_left(10);  // a mask of 3000 * 3000
  request.mutable_execution()->set_implementation("torch_sdpa");
  EXPECT_EQ(ErrorReason(Call(dispatcher, rpcs::kAttend, request).status), "WORKSPACE_LIMIT");
}

TEST_F(DispatcherTest, DrainRefusesNewCallsAndLetsRunningOnesFinish) {
  std::promise<void> release = BlockDevice();
  std::future<Reply> running = std::async(
      std::launch::async, [&] { return Call(dispatcher_, rpcs::kAttend, RandomAttend(12)); });
  while (state_.queues().front()->size() < 1) std::this_thread::yield();
  dispatcher_.BeginDrain();
  EXPECT_EQ(Call(dispatcher_, rpcs::kAttend, RandomAttend(12)).status.code(),
            absl::StatusCode::kUnavailable);
  EXPECT_FALSE(dispatcher_.WaitUntilIdle(Clock::now()));
  release.set_value();
  EXPECT_TRUE(running.get().status.ok());
  EXPECT_TRUE(dispatcher_.WaitUntilIdle(Clock::now() + std::chrono::seconds(10)));
}

TEST_F(DispatcherTest, ControlPlaneDescribesWhatIsThere) {
  ASSERT_TRUE(Load(SpecOf("m", 4, 16)).ok());
  const auto models = Call(dispatcher_, rpcs::kListModels, proto::ListModelsRequest())
                          .As<proto::ListModelsResponse>();
  ASSERT_EQ(models.models_size(), 1);
  EXPECT_EQ(models.models(0).active_implementation(), "auto");
  EXPECT_EQ(models.models(0).managers(0).device(), "cpu:0");
  EXPECT_EQ(models.models(0).spec().stacks(0).self_attention(0).num_kv_heads(), 4u);
  const auto rows =
      Call(dispatcher_, rpcs::kListImplementations, proto::ListImplementationsRequest())
          .As<proto::ListImplementationsResponse>();
  EXPECT_EQ(rows.implementations_size(), static_cast<int>(BuiltInImplementations().size()));
  const auto hardware = Call(dispatcher_, rpcs::kGetHardware, proto::GetHardwareRequest())
                            .As<proto::GetHardwareResponse>();
  EXPECT_GE(hardware.cpu().cores(), 1u);
  EXPECT_GT(hardware.cpu().memory_bytes(), 0u);
  proto::UnloadModelRequest unload;
  unload.set_model("m");
  EXPECT_TRUE(Call(dispatcher_, rpcs::kUnloadModel, unload).status.ok());
  EXPECT_EQ(Call(dispatcher_, rpcs::kUnloadModel, unload).status.code(),
            absl::StatusCode::kNotFound);
}

TEST_F(DispatcherTest, SelectAttentionTellsWhatAutoWouldChooseAndWhy) {
  ASSERT_TRUE(Load(SpecOf("m", 4, 16)).ok());
  proto::SelectAttentionRequest request;
  request.mutable_layer()->set_model("m");
  request.mutable_shape()->set_batch(1);
  request.mutable_shape()->set_q_len(9);
  request.mutable_shape()->set_kv_len(9);
  const auto select = [&] {
    const Reply reply = Call(dispatcher_, rpcs::kSelectAttention, request);
    EXPECT_TRUE(reply.status.ok()) << reply.status;
    return reply.As<proto::SelectAttentionResponse>();
  };
  auto response = select();
  ASSERT_EQ(response.candidates_size(), static_cast<int>(BuiltInImplementations().size()));
  EXPECT_EQ(response.candidates(0).implementation(), response.implementation());
  EXPECT_NE(response.reason().find(response.implementation() + ": estimated"), std::string::npos);
  for (const proto::Candidate& candidate : response.candidates()) {
    EXPECT_FALSE(candidate.reason().empty());
    EXPECT_GT(candidate.estimated_seconds(), 0.0) << candidate.implementation();
    EXPECT_EQ(candidate.eligible(), candidate.implementation() != "sparse");
  }
  request.mutable_shape()->set_output_attentions(true);
  response = select();
  EXPECT_EQ(response.implementation(), "standard");
  EXPECT_FALSE(response.candidates(1).eligible());
  request.mutable_shape()->set_q_len(20000);  // 3 GB of scores: more than an execution may have
  request.mutable_shape()->set_kv_len(40000);
  response = select();
  EXPECT_EQ(response.implementation(), "");
  EXPECT_NE(response.reason().find("scratch memory"), std::string::npos) << response.reason();
}

TEST_F(DispatcherTest, SelectAttentionNamesTheFieldThatIsWrong) {
  ASSERT_TRUE(Load(SpecOf("m", 4, 16)).ok());
  proto::SelectAttentionRequest good;
  good.mutable_layer()->set_model("m");
  good.mutable_shape()->set_batch(2);
  good.mutable_shape()->set_q_len(4);
  good.mutable_shape()->set_kv_len(8);
  const auto field = [&](const proto::SelectAttentionRequest& request) {
    return ErrorDetailsOf(Call(dispatcher_, rpcs::kSelectAttention, request).status)["field"];
  };
  EXPECT_EQ(field(good), "");
  proto::SelectAttentionRequest request = good;
  request.clear_layer();
  EXPECT_EQ(field(request), "layer.model");
  request = good;
  request.mutable_shape()->set_batch(0);
  EXPECT_EQ(field(request), "shape.batch");
  request = good;
  request.mutable_shape()->set_kv_len(4000000000u);
  EXPECT_EQ(field(request), "shape.kv_len");
  request = good;
  request.mutable_shape()->set_dtype(proto::DATA_TYPE_INT64);
  EXPECT_EQ(field(request), "shape.dtype");
  request = good;
  request.mutable_shape()->add_query_lengths(3);
  EXPECT_EQ(field(request), "shape.query_lengths");
  request = good;
  request.mutable_shape()->add_kv_lengths(3);
  request.mutable_shape()->add_kv_lengths(9);
  EXPECT_EQ(field(request), "shape.kv_lengths");
  request = good;
  request.mutable_layer()->set_layer(7);
  EXPECT_EQ(Call(dispatcher_, rpcs::kSelectAttention, request).status.code(),
            absl::StatusCode::kNotFound);
}

class FakeHardware final : public HardwareSource {
 public:
  HardwareDescription Describe() const override {
    return {DescribeCpu(),
            {{"fake", 6, 1, false, std::uint64_t{6} << 30, std::uint64_t{5} << 30, 10}}};
  }
  std::string ActiveIsa() const override { return "avx2"; }
  std::uint64_t AvailableBytes() const override { return std::uint64_t{512} << 20; }
};

TEST(HardwareHandlerTest, ShowsGpusAndFreeMemoryBindsTheChoice) {
  ServerOptions options = SmallServer();
  options.limits.max_workspace_bytes = std::uint64_t{8} << 30;
  options.hardware = std::make_shared<FakeHardware>();
  ServerState state(options, BuiltInImplementations());
  Dispatcher dispatcher(state);
  const auto hardware = Call(dispatcher, rpcs::kGetHardware, proto::GetHardwareRequest())
                            .As<proto::GetHardwareResponse>();
  ASSERT_EQ(hardware.gpus_size(), 1);
  EXPECT_EQ(hardware.gpus(0).compute_capability(), "6.1");
  EXPECT_FALSE(hardware.gpus(0).tensor_cores());
  proto::LoadModelRequest load;
  *load.mutable_spec() = SpecOf("m", 4, 16);
  ASSERT_TRUE(Call(dispatcher, rpcs::kLoadModel, load).status.ok());
  proto::SelectAttentionRequest request;
  request.mutable_layer()->set_model("m");
  request.mutable_shape()->set_batch(1);
  request.mutable_shape()->set_q_len(16384);  // 1 GiB for a head's scores
  request.mutable_shape()->set_kv_len(16384);
  request.mutable_shape()->set_output_attentions(true);
  const auto response =
      Call(dispatcher, rpcs::kSelectAttention, request).As<proto::SelectAttentionResponse>();
  EXPECT_EQ(response.implementation(), "");
  EXPECT_NE(response.reason().find("512 MiB"), std::string::npos) << response.reason();
}

TEST_F(DispatcherTest, ASwitchThatCantServeTheModelLeavesTheActiveOne) {
  proto::ModelSpec spec = SpecOf("m", 4, 16);
  spec.mutable_stacks(0)->mutable_self_attention(0)->mutable_options()->set_soft_cap(30.0);
  ASSERT_TRUE(Load(spec).ok());
  proto::SwitchAttentionRequest change;
  change.set_model("m");
  change.set_implementation("torch_sdpa");
  const auto response =
      Call(dispatcher_, rpcs::kSwitchAttention, change).As<proto::SwitchAttentionResponse>();
  EXPECT_FALSE(response.switched());
  EXPECT_EQ(response.active(), "auto");
  EXPECT_FALSE(response.reason().empty());
  change.set_implementation("nothing");
  EXPECT_EQ(Call(dispatcher_, rpcs::kSwitchAttention, change).status.code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace attn::server
