// Sessions as objects: what is executed once, whatever becomes of calls and answers on the way.
#include "client/cpp/session.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/client/cpp/fake_sessions.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;

using Tokens = std::vector<float>;

ForwardCall Append(const Tokens& tokens) {
  ForwardCall call;
  call.hidden_states =
      Tensor::FromFloats({1, static_cast<int64_t>(tokens.size()), 1}, tokens).value();
  return call;
}

// Attempts that follow each other at once.
RetryPolicy Impatient(int max_attempts = 6) {
  RetryPolicy policy;
  policy.max_attempts = max_attempts;
  policy.initial_backoff_seconds = 0.001;
  policy.max_backoff_seconds = 0.001;
  return policy;
}

class SessionTest : public testing::Test {
 protected:
  SessionTest() {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&fake_);
    server_ = builder.BuildAndStart();
    client_ = Client::Create(absl::StrCat("127.0.0.1:", port)).value();
  }
  ~SessionTest() override {
    fake_.Release();
    server_->Shutdown();
  }

  Session Open(const RetryPolicy& retry = Impatient()) {
    return client_->OpenSession({.model = "m", .retry = retry}).value();
  }

  FakeSessions fake_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Client> client_;
};

TEST_F(SessionTest, OpensAppendsAndCloses) {
  SessionOptions options;
  options.model = "m";
  options.reserve_tokens = 7;
  options.time_to_live_seconds = 9;
  options.cache_dtype = kBfloat16;
  options.rollback_tokens = 11;
  Session session = client_->OpenSession(options).value();
  EXPECT_EQ(fake_.opened.model(), "m");
  EXPECT_EQ(fake_.opened.reserve_tokens(), 7u);
  EXPECT_EQ(fake_.opened.time_to_live_seconds(), 9);
  EXPECT_EQ(fake_.opened.cache_dtype(), v1::DATA_TYPE_BFLOAT16);
  EXPECT_EQ(fake_.opened.rollback_tokens(), 11u);
  EXPECT_EQ(session.time_to_live_seconds(), 600);
  EXPECT_EQ(session.server_epoch(), "epoch");
  EXPECT_EQ(session.length({}), 0);

  const ForwardResult first = session.Forward(Append({1, 2})).value();
  EXPECT_EQ(first.output.ToFloats().value(), Tokens({1, 3}));
  EXPECT_EQ(first.output.shape, std::vector<int64_t>({1, 2, 1}));
  EXPECT_EQ(session.Forward(Append({4})).value().output.ToFloats().value(), Tokens({7}));
  EXPECT_EQ(session.length({}), 3);
  EXPECT_EQ(fake_.forwards.back().layer().model(), "m");
  EXPECT_EQ(session.Get().value().layers(0).length(), 3);

  EXPECT_TRUE(session.Close().ok());
  EXPECT_TRUE(fake_.Open().empty());
  EXPECT_EQ(session.Close().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(session.Forward(Append({1})).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(session.Fork().status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(fake_.calls("CloseSession"), 1);
}

TEST_F(SessionTest, TheDestructorClosesWhatIsStillOpen) {
  {
    Session first = Open();
    Session second = Open();
    const std::string kept = second.id();
    first = std::move(second);
    EXPECT_EQ(fake_.Open(), std::vector<std::string>({kept}));
    const Session moved = std::move(first);
    EXPECT_EQ(moved.id(), kept);
    client_.reset();  // a session may outlive its client
    EXPECT_EQ(fake_.calls("CloseSession"), 1);
  }
  EXPECT_TRUE(fake_.Open().empty());
  EXPECT_EQ(fake_.calls("CloseSession"), 2);
}

TEST_F(SessionTest, StepsRiseInEachLayerByItself) {
  Session session = Open();
  ForwardCall upper = Append({5});
  upper.layer.index = 1;
  ASSERT_TRUE(session.Forward(Append({1})).ok());
  ASSERT_TRUE(session.Forward(Append({2})).ok());
  ASSERT_TRUE(session.Forward(std::move(upper)).ok());
  std::vector<uint64_t> steps;
  for (const v1::ForwardRequest& request : fake_.forwards) {
    steps.push_back(request.past_key_value().sessions().step(0));
  }
  EXPECT_EQ(steps, std::vector<uint64_t>({1, 2, 1}));
  EXPECT_EQ(session.length({.index = 1}), 1);
}

TEST_F(SessionTest, WhatIsLostIsExecutedOnce) {
  Session session = Open();
  const std::vector<std::vector<Fault::Kind>> losses = {
      {Fault::kLoseCall},
      {Fault::kLoseAnswer},
      {Fault::kLoseAnswer, Fault::kLoseAnswer, Fault::kLoseCall},
      {Fault::kLoseCall, Fault::kLoseAnswer},
  };
  Tokens expected;
  float sum = 0;
  for (size_t i = 0; i < losses.size(); ++i) {
    std::vector<Fault> faults;
    for (const Fault::Kind kind : losses[i]) faults.push_back({kind});
    fake_.Expect(faults);
    const float token = static_cast<float>(10 + i);
    const auto result = session.Forward(Append({token}));
    ASSERT_TRUE(result.ok()) << result.status();
    sum += token;
    expected.push_back(token);
    EXPECT_EQ(result->output.ToFloats().value(), Tokens({sum}));
    EXPECT_EQ(result->attempts, static_cast<int>(losses[i].size()) + 1);
    EXPECT_EQ(fake_.Tokens(session.id()), expected);
    EXPECT_EQ(session.length({}), static_cast<int64_t>(expected.size()));
  }
}

TEST_F(SessionTest, ARetryCutsAndChecksTheSamePlace) {
  Session session = Open();
  ASSERT_TRUE(session.Forward(Append({1, 2, 3})).ok());
  fake_.Expect({{Fault::kLoseAnswer}});
  ForwardCall call = Append({9});
  call.cache.truncate = {1};
  call.cache.cache_position = {1};
  ASSERT_TRUE(session.Forward(std::move(call)).ok());
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1, 9}));
}

TEST_F(SessionTest, AttemptsThatHangAreGivenUpAndTheirLateCopiesRefused) {
  RetryPolicy policy = Impatient();
  policy.attempt_timeout_seconds = 0.2;
  Session session = Open(policy);
  fake_.Expect({{Fault::kHangBefore}});
  const auto result = session.Forward(Append({1}));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->attempts, 2);
  ASSERT_TRUE(session.Forward(Append({2})).ok());
  fake_.Release();
  fake_.AwaitLate(1);
  EXPECT_EQ(fake_.late_refused(), 1);
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1, 2}));
}

// Not executed when the call failed, and executed only afterwards: the worst copy there is.
TEST_F(SessionTest, ACallThatFailedDoesNotHappenLater) {
  Session session = Open(Impatient(1));
  ASSERT_TRUE(session.Forward(Append({1})).ok());
  fake_.Expect({{Fault::kHangBefore}});
  ForwardCall call = Append({2});
  call.timeout_seconds = 0.2;
  EXPECT_EQ(session.Forward(std::move(call)).status().code(), absl::StatusCode::kDeadlineExceeded);
  ASSERT_TRUE(session.Forward(Append({3})).ok());
  fake_.Release();
  fake_.AwaitLate(1);
  EXPECT_EQ(fake_.late_refused(), 1);
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1, 3}));
}

TEST_F(SessionTest, ACallThatFailedIsTakenBackByTheNext) {
  Session session = Open(Impatient(1));
  ASSERT_TRUE(session.Forward(Append({1})).ok());
  fake_.Expect({{Fault::kLoseAnswer}});
  EXPECT_EQ(session.Forward(Append({2, 2})).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1, 2, 2}));
  EXPECT_EQ(session.length({}), 1);

  // Calls that change nothing do not see it either, and do not end the doubt.
  ForwardCall look = Append({5});
  look.cache.mode = CacheMode::kDiscard;
  EXPECT_EQ(session.Forward(std::move(look)).value().output.ToFloats().value(), Tokens({6}));
  ForwardCall beyond = Append({5});
  beyond.cache.truncate = {2};
  EXPECT_EQ(session.Forward(std::move(beyond)).status().code(), absl::StatusCode::kOutOfRange);

  ASSERT_TRUE(session.Forward(Append({3})).ok());
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1, 3}));
  ASSERT_TRUE(session.Forward(Append({4})).ok());
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1, 3, 4}));
  EXPECT_EQ(fake_.forwards.back().past_key_value().sessions().truncate_size(), 0);
}

TEST_F(SessionTest, TheCutOfACallThatFailedStands) {
  Session session = Open(Impatient(1));
  ASSERT_TRUE(session.Forward(Append({1, 2, 3})).ok());
  for (const Fault::Kind kind : {Fault::kLoseCall, Fault::kLoseAnswer}) {
    fake_.Expect({{kind}});
    ForwardCall call = Append({7, 7, 7});
    call.cache.truncate = {1};
    EXPECT_FALSE(session.Forward(std::move(call)).ok());
    EXPECT_EQ(session.length({}), 1);
    ASSERT_TRUE(session.Forward(Append({8})).ok());
    EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1, 8}));
  }
}

TEST_F(SessionTest, ARefusalChangesNothingAndIsNotRetried) {
  Session session = Open();
  ASSERT_TRUE(session.Forward(Append({1, 2})).ok());
  fake_.Expect({{Fault::kFail}});
  ForwardCall call = Append({7});
  call.cache.truncate = {1};
  EXPECT_EQ(session.Forward(std::move(call)).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(fake_.calls("Forward"), 2);
  EXPECT_EQ(session.length({}), 2);
  ASSERT_TRUE(session.Forward(Append({3})).ok());
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1, 2, 3}));
  EXPECT_EQ(fake_.forwards.back().past_key_value().sessions().truncate_size(), 0);
}

TEST_F(SessionTest, ARefusalAfterALostAnswerLeavesTheCallInDoubt) {
  Session session = Open();
  fake_.Expect({{Fault::kLoseAnswer}, {Fault::kFail}});
  EXPECT_EQ(session.Forward(Append({7})).status().code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(session.Forward(Append({1})).ok());
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1}));
}

TEST_F(SessionTest, WaitsAsLongAsTheServerSaysAndNoLongerThanTheDeadline) {
  Session session = Open();
  fake_.Expect({{Fault::kRefuse, 0.3}});
  const auto started = std::chrono::steady_clock::now();
  EXPECT_EQ(session.Forward(Append({1})).value().attempts, 2);
  EXPECT_GE(std::chrono::steady_clock::now() - started, std::chrono::milliseconds(300));

  fake_.Expect({{Fault::kRefuse, 3600}});
  const absl::Status status = session.Forward(Append({2})).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorOf(status).retry_delay_seconds, 3600);

  fake_.Expect({{Fault::kRefuse, 0}});  // waiting does not help
  EXPECT_EQ(session.Forward(Append({2})).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(fake_.calls("Forward"), 4);
}

TEST_F(SessionTest, AttemptsAreLimitedAndTheErrorTellsHowMany) {
  Session session = Open(Impatient(3));
  fake_.Expect({{Fault::kRefuse, 0.001}, {Fault::kRefuse, 0.001}, {Fault::kRefuse, 0.001}});
  const absl::Status status = session.Forward(Append({1})).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("3 attempts"), std::string::npos) << status;
  EXPECT_EQ(ErrorOf(status).reason, "TEST");
  EXPECT_EQ(fake_.calls("Forward"), 3);
}

TEST_F(SessionTest, CancellationReachesACallThatWaitsToBeRetried) {
  RetryPolicy policy;
  policy.initial_backoff_seconds = 1000;
  policy.max_backoff_seconds = 1000;
  Session session = Open(policy);
  fake_.Expect({{Fault::kLoseCall}});
  ForwardCall call = Append({1});
  call.timeout_seconds = 0;
  absl::Status status;
  std::thread caller([&] { status = session.Forward(std::move(call)).status(); });
  while (fake_.calls("Forward") == 0) std::this_thread::yield();
  // Round trips on the same connection, which the lost call's answer will have overtaken. Where it
  // has not, the cancellation ends the attempt instead.
  for (int i = 0; i < 50; ++i) client_->GetServerInfo().IgnoreError();
  EXPECT_EQ(client_->CancelCalls(), 1);
  caller.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
}

TEST_F(SessionTest, ReadOnlyAndDiscardHaveNoStepAndAreRetried) {
  Session session = Open();
  ASSERT_TRUE(session.Forward(Append({1, 2})).ok());
  fake_.Expect({{Fault::kLoseAnswer}});
  ForwardCall call = Append({5});
  call.cache.mode = CacheMode::kDiscard;
  const ForwardResult result = session.Forward(std::move(call)).value();
  EXPECT_EQ(result.output.ToFloats().value(), Tokens({8}));
  EXPECT_EQ(result.cache_length, std::vector<int64_t>({2}));
  EXPECT_EQ(fake_.forwards.back().past_key_value().sessions().step_size(), 0);
  ForwardCall read = Append({});
  read.cache.mode = CacheMode::kReadOnly;
  EXPECT_TRUE(session.Forward(std::move(read)).ok());
  EXPECT_EQ(fake_.forwards.back().past_key_value().sessions().mode(), v1::CACHE_MODE_READ_ONLY);
  ASSERT_TRUE(session.Forward(Append({3})).ok());
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1, 2, 3}));
}

TEST_F(SessionTest, ForksInheritTokensAndCounts) {
  Session session = Open();
  ASSERT_TRUE(session.Forward(Append({1, 2})).ok());
  ASSERT_TRUE(session.Forward(Append({3})).ok());
  std::vector<Session> forks = session.Fork(2, 2).value();
  ASSERT_EQ(forks.size(), 2u);
  EXPECT_EQ(forks[0].length({}), 2);
  fake_.Expect({{Fault::kLoseAnswer}, {}, {Fault::kLoseCall}});
  ASSERT_TRUE(forks[0].Forward(Append({7})).ok());
  ASSERT_TRUE(forks[1].Forward(Append({8})).ok());
  ASSERT_TRUE(session.Forward(Append({4})).ok());
  EXPECT_EQ(fake_.Tokens(forks[0].id()), Tokens({1, 2, 7}));
  EXPECT_EQ(fake_.Tokens(forks[1].id()), Tokens({1, 2, 8}));
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1, 2, 3, 4}));
  forks.clear();
  EXPECT_EQ(fake_.Open(), std::vector<std::string>({session.id()}));
}

TEST_F(SessionTest, AForkOfACallInDoubtDoesNotHaveItsTokens) {
  Session session = Open(Impatient(1));
  ASSERT_TRUE(session.Forward(Append({1})).ok());
  fake_.Expect({{Fault::kLoseAnswer}});
  ASSERT_FALSE(session.Forward(Append({2})).ok());
  std::vector<Session> forks = session.Fork().value();
  ASSERT_TRUE(forks[0].Forward(Append({3})).ok());
  EXPECT_EQ(fake_.Tokens(forks[0].id()), Tokens({1, 3}));
}

TEST_F(SessionTest, OpenAndForkAreRetriedWhereTheServerRefusedThemOnly) {
  fake_.Expect({{Fault::kRefuse, 0.001}, {}, {Fault::kLoseAnswer}});
  Session session = Open();
  EXPECT_EQ(fake_.calls("OpenSession"), 2);
  EXPECT_EQ(client_->OpenSession({.model = "m"}).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(fake_.calls("OpenSession"), 3);
  fake_.Expect({{Fault::kRefuse, 0.001}, {}, {Fault::kLoseAnswer}});
  EXPECT_TRUE(session.Fork().ok());
  fake_.Expect({{Fault::kLoseAnswer}});
  EXPECT_EQ(session.Fork().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(fake_.calls("ForkSession"), 3);
}

TEST_F(SessionTest, ALostAnswerToCloseIsNoError) {
  Session session = Open();
  fake_.Expect({{Fault::kLoseAnswer}});
  EXPECT_TRUE(session.Close().ok());
  Session expired = Open();
  v1::CloseSessionRequest request;
  request.set_session_id(expired.id());
  ASSERT_TRUE(client_->CloseSession(request).ok());
  EXPECT_EQ(expired.Close().code(), absl::StatusCode::kNotFound);
}

TEST_F(SessionTest, ABatchIsOneCallWithEachSessionsOwnStep) {
  Session first = Open(), second = Open();
  ASSERT_TRUE(first.Forward(Append({1})).ok());
  fake_.Expect({{Fault::kLoseAnswer}});
  ForwardCall call;
  call.hidden_states = Tensor::FromFloats({2, 2, 1}, {2, 3, 4, 5}).value();
  call.cache.cache_position = {1, -1};
  const ForwardResult result = Session::ForwardBatch({&first, &second}, std::move(call)).value();
  EXPECT_EQ(result.output.ToFloats().value(), Tokens({3, 6, 4, 9}));
  EXPECT_EQ(result.cache_length, std::vector<int64_t>({3, 2}));
  EXPECT_EQ(fake_.Tokens(first.id()), Tokens({1, 2, 3}));
  EXPECT_EQ(fake_.Tokens(second.id()), Tokens({4, 5}));
  EXPECT_EQ(second.length({}), 2);
  const v1::SessionBatch& batch = fake_.forwards.back().past_key_value().sessions();
  EXPECT_EQ(batch.step(0), 2u);
  EXPECT_EQ(batch.step(1), 1u);
}

TEST_F(SessionTest, ABatchInDoubtIsTakenBackFromEachSessionByItself) {
  Session first = Open(Impatient(1)), second = Open(Impatient(1));
  fake_.Expect({{Fault::kLoseAnswer}});
  ForwardCall lost;
  lost.hidden_states = Tensor::FromFloats({2, 1, 1}, {2, 4}).value();
  ASSERT_FALSE(Session::ForwardBatch({&first, &second}, std::move(lost)).ok());
  ASSERT_TRUE(second.Forward(Append({1})).ok());
  ForwardCall call;
  call.hidden_states = Tensor::FromFloats({2, 1, 1}, {7, 8}).value();
  ASSERT_TRUE(Session::ForwardBatch({&first, &second}, std::move(call)).ok());
  EXPECT_EQ(fake_.Tokens(first.id()), Tokens({7}));
  EXPECT_EQ(fake_.Tokens(second.id()), Tokens({1, 8}));
}

TEST_F(SessionTest, BatchesThatCannotBeAreRefusedUnsent) {
  Session session = Open();
  const auto other_client = Client::Create(client_->address()).value();
  Session foreign = other_client->OpenSession({.model = "m"}).value();
  Session other_model = client_->OpenSession({.model = "n"}).value();
  EXPECT_EQ(Session::ForwardBatch({}, Append({1})).status().code(),
            absl::StatusCode::kInvalidArgument);
  for (Session* other : {&foreign, &other_model}) {
    EXPECT_EQ(Session::ForwardBatch({&session, other}, Append({1})).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
  ForwardCall call = Append({1});
  call.cache.truncate = {1, 2};
  EXPECT_EQ(session.Forward(std::move(call)).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(fake_.calls("Forward"), 0);
}

TEST_F(SessionTest, ALayerHasOneName) {
  Session session = Open();
  ASSERT_TRUE(session.Forward(Append({1})).ok());
  ForwardCall call = Append({2});
  call.layer.stack = "decoder";
  EXPECT_EQ(session.Forward(std::move(call)).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SessionTest, AttendHasStepsAndRetriesToo) {
  Session session = client_->OpenSession({.retry = Impatient()}).value();
  fake_.Expect({{Fault::kLoseAnswer}, {Fault::kLoseAnswer}});
  for (const float token : {1.0f, 2.0f}) {
    AttendCall call;
    call.tensor_layout = v1::TENSOR_LAYOUT_TOKENS_FIRST;
    call.query = call.key = call.value = Tensor::FromFloats({1, 1, 1, 1}, {token}).value();
    ASSERT_TRUE(session.Attend(std::move(call)).ok());
  }
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({1, 2}));
  EXPECT_EQ(session.length({}), 2);
}

TEST_F(SessionTest, AnAnswerWithoutLengthsIsTheServersError) {
  Session session = Open();
  fake_.Expect({{Fault::kForgetLengths}});
  EXPECT_EQ(session.Forward(Append({1})).status().code(), absl::StatusCode::kInternal);
  ASSERT_TRUE(session.Forward(Append({2})).ok());
  EXPECT_EQ(fake_.Tokens(session.id()), Tokens({2}));
}

TEST_F(SessionTest, ARequestTooLargeIsNotInDoubt) {
  ClientOptions options;
  options.max_message_bytes = 1000;
  const auto client = Client::Create(client_->address(), options).value();
  Session session = client->OpenSession({.model = "m"}).value();
  ForwardCall call = Append(Tokens(1000));
  call.cache.truncate = {0};
  EXPECT_EQ(session.Forward(std::move(call)).status().code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(session.Forward(Append({2})).ok());
  EXPECT_EQ(fake_.forwards.back().past_key_value().sessions().truncate_size(), 0);
}

}  // namespace
}  // namespace attn::client
