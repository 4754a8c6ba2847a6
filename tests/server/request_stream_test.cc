// A stream of requests without gRPC: pipelining, order, errors of one request, limits, timeouts,
// cancellation, a caller that vanishes.
#include "server/request_stream.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <map>

#include "core/error.h"
#include "tests/server/session_calls.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

ServerOptions Options() {
  ServerOptions options = SmallServer();
  options.limits.max_stream_requests = 64;
  options.limits.max_stream_bytes = 1 << 20;
  options.limits.queue_capacity = 1024;
  return options;
}

// What the caller of a stream sees. Answers are sent at once, unless they are kept.
class Caller {
 public:
  Caller(ServerState& state, Dispatcher& dispatcher,
         Clock::time_point deadline = Clock::time_point::max())
      : stream_(std::make_shared<RequestStream>(
            state, dispatcher, deadline,
            [this](StreamAnswer answer) { Receive(std::move(answer)); })) {}

  bool Send(const proto::StreamRequest& request) {
    return stream_->OnMessage(BytesOf(request.SerializeAsString()));
  }
  bool Attend(std::uint64_t id, const proto::AttendRequest& request, double timeout = 0.0) {
    proto::StreamRequest message;
    message.set_id(id);
    message.set_timeout_seconds(timeout);
    *message.mutable_attend() = request;
    return Send(message);
  }
  void Cancel(std::uint64_t id) {
    proto::StreamRequest message;
    message.set_id(1234567);
    message.set_cancel(id);
    EXPECT_FALSE(Send(message));
  }
  RequestStream& stream() { return *stream_; }

  // The first `count` answers, in order.
  std::vector<proto::StreamResponse> Answers(std::size_t count) {
    std::unique_lock lock(mutex_);
    arrived_.wait(lock, [&] { return answers_.size() >= count; });
    EXPECT_EQ(answers_.size(), count);
    return answers_;
  }
  std::map<std::uint64_t, proto::StreamResponse> AnswersById(std::size_t count) {
    std::map<std::uint64_t, proto::StreamResponse> by_id;
    for (const proto::StreamResponse& answer : Answers(count)) by_id[answer.id()] = answer;
    EXPECT_EQ(by_id.size(), count);
    return by_id;
  }
  // From now on what answers hold is not let go until DropKept.
  void Keep() { keep_ = true; }
  void DropKept() {
    std::vector<StreamAnswer> dropped;
    std::lock_guard lock(mutex_);
    dropped.swap(kept_);
  }
  // Called once, with the answer sent, on the thread that answers.
  void OnAnswer(std::function<void()> then) { then_ = std::move(then); }

 private:
  void Receive(StreamAnswer answer) {
    std::string bytes;
    for (const AnswerPiece& piece : answer.answer.pieces) {
      bytes.append(static_cast<const char*>(piece.data()), piece.size());
    }
    proto::StreamResponse response;
    EXPECT_TRUE(response.ParseFromString(bytes));
    StreamAnswer sent = std::move(answer);
    if (!keep_) sent = {};
    const auto then = std::exchange(then_, nullptr);
    if (then) then();
    std::lock_guard lock(mutex_);
    if (keep_) kept_.push_back(std::move(sent));
    answers_.push_back(std::move(response));
    arrived_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<proto::StreamResponse> answers_;
  std::vector<StreamAnswer> kept_;
  std::atomic<bool> keep_{false};
  std::function<void()> then_;
  std::shared_ptr<RequestStream> stream_;
};

class RequestStreamTest : public testing::Test {
 protected:
  static absl::StatusCode CodeOf(const proto::StreamResponse& answer) {
    return static_cast<absl::StatusCode>(answer.error().code());
  }
  proto::AttendRequest At(const std::string& session, std::int64_t position, unsigned seed) {
    proto::AttendRequest request = SessionAttend({session}, seed);
    request.mutable_past_key_value()->mutable_sessions()->add_cache_position(position);
    return request;
  }

  ServerState state_{Options(), BuiltInImplementations()};
  Dispatcher dispatcher_{state_};
};

TEST_F(RequestStreamTest, SixtyFourSessionsInFlightAreAllAnsweredInOrderPerSession) {
  constexpr std::uint64_t kSessions = 64;
  constexpr std::uint64_t kSteps = 6;
  ServerOptions options = Options();
  options.limits.max_stream_requests = kSessions * kSteps;
  options.limits.max_stream_bytes = 64 << 20;
  ServerState state(options, BuiltInImplementations());
  Dispatcher dispatcher(state);
  Caller caller(state, dispatcher);
  std::vector<std::string> sessions;
  for (std::uint64_t i = 0; i < kSessions; ++i) sessions.push_back(OpenSession(dispatcher));
  {
    DeviceBlock block(state);  // so that all of them are in flight at once
    for (std::uint64_t step = 0; step < kSteps; ++step) {
      for (std::uint64_t i = 0; i < kSessions; ++i) {
        EXPECT_TRUE(caller.Attend(step * kSessions + i + 1,
                                  At(sessions[i], static_cast<std::int64_t>(step),
                                     static_cast<unsigned>(step * kSessions + i))));
      }
    }
  }
  std::map<std::uint64_t, std::uint64_t> steps;  // answered, by session
  for (const proto::StreamResponse& answer : caller.Answers(kSessions * kSteps)) {
    const std::uint64_t session = (answer.id() - 1) % kSessions;
    ASSERT_TRUE(answer.has_attend()) << answer.error().message();
    EXPECT_EQ((answer.id() - 1) / kSessions, steps[session]++);
    EXPECT_EQ(answer.attend().cache_length(0), static_cast<std::int64_t>(steps[session]));
  }
  EXPECT_EQ(steps.size(), kSessions);
}

TEST_F(RequestStreamTest, AnswersAreThoseOfACallOfItsOwn) {
  Caller caller(state_, dispatcher_);
  const std::string session = OpenSession(dispatcher_);
  std::vector<proto::AttendRequest> earlier;
  for (unsigned step = 0; step < 3; ++step) {
    const proto::AttendRequest request = SessionAttend({session}, step, 5);
    EXPECT_TRUE(caller.Attend(step + 1, request));
    const auto expected = Call(dispatcher_, rpcs::kAttend, WithoutSessions(earlier, request))
                              .As<proto::AttendResponse>();
    EXPECT_TRUE(AllClose(ValuesOf(caller.Answers(step + 1)[step].attend().output()),
                         ValuesOf(expected.output())));
    earlier.push_back(request);
  }
}

TEST_F(RequestStreamTest, OneFailingRequestInTheMiddleFailsAloneAndThoseThatBuildOnIt) {
  Caller caller(state_, dispatcher_);
  const std::string a = OpenSession(dispatcher_);
  const std::string b = OpenSession(dispatcher_);
  {
    DeviceBlock block(state_);
    caller.Attend(1, At(a, 0, 1));
    proto::AttendRequest bad = At(a, 1, 2);
    bad.mutable_query()->set_shape(3, 7);
    caller.Attend(2, bad);
    caller.Attend(3, At(a, 2, 3));  // where it would stand if 2 had not failed
    caller.Attend(4, At(a, 1, 4));  // where it stands
    caller.Attend(5, At(b, 0, 5));
    caller.Attend(6, At("nobody", 0, 6));
    caller.Attend(7, At(b, 1, 7));
  }
  auto answers = caller.AnswersById(7);
  EXPECT_TRUE(answers[1].has_attend());
  EXPECT_EQ(CodeOf(answers[2]), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CodeOf(answers[3]), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(answers[3].error().details().at("length"), "1");
  EXPECT_EQ(answers[4].attend().cache_length(0), 2);
  EXPECT_TRUE(answers[5].has_attend());
  EXPECT_EQ(CodeOf(answers[6]), absl::StatusCode::kNotFound);
  EXPECT_EQ(answers[7].attend().cache_length(0), 2);
}

TEST_F(RequestStreamTest, SessionsAreOpenedForkedAndClosedInOrderWithTheirCalls) {
  Caller caller(state_, dispatcher_);
  proto::StreamRequest message;
  message.set_id(1);
  message.mutable_open();
  EXPECT_TRUE(caller.Send(message));
  const std::string session = caller.Answers(1)[0].open().session_id();
  DeviceBlock block(state_);
  caller.Attend(2, At(session, 0, 1));
  message.set_id(3);
  message.mutable_fork()->set_session_id(session);
  message.mutable_fork()->set_count(2);
  caller.Send(message);
  message.set_id(4);
  message.mutable_close()->set_session_id(session);
  caller.Send(message);
  caller.Attend(5, At(session, 1, 2));  // behind the close
  block.Release();
  auto answers = caller.AnswersById(5);
  EXPECT_TRUE(answers[2].has_attend());
  ASSERT_EQ(answers[3].fork().session_ids_size(), 2);
  EXPECT_TRUE(answers[4].has_close());
  EXPECT_EQ(CodeOf(answers[5]), absl::StatusCode::kNotFound);
  const auto fork = Call(dispatcher_, rpcs::kAttend, At(answers[3].fork().session_ids(1), 1, 3));
  EXPECT_TRUE(fork.status.ok()) << fork.status;
}

TEST_F(RequestStreamTest, AnIdInUseIsRefusedAndFreeAgainOnceItIsAnswered) {
  Caller caller(state_, dispatcher_);
  {
    DeviceBlock block(state_);
    EXPECT_TRUE(caller.Attend(9, RandomAttend(1)));
    EXPECT_TRUE(caller.Attend(9, RandomAttend(2)));
    const proto::StreamResponse refused = caller.Answers(1)[0];
    EXPECT_EQ(refused.id(), 9u);
    EXPECT_EQ(refused.error().reason(), "DUPLICATE_ID");
    EXPECT_EQ(refused.error().details().at("field"), "id");
  }
  EXPECT_TRUE(caller.Answers(2)[1].has_attend());
  EXPECT_TRUE(caller.Attend(9, RandomAttend(3)));
  EXPECT_TRUE(caller.Answers(3)[2].has_attend());
}

TEST_F(RequestStreamTest, BeyondTheLimitOfRequestsIsRefusedUntilAnswersAreSent) {
  Caller caller(state_, dispatcher_);
  caller.Keep();
  {
    DeviceBlock block(state_);
    for (std::uint64_t id = 1; id <= 65; ++id) caller.Attend(id, RandomAttend(1, 1, 1, 1, 1));
    const proto::StreamResponse refused = caller.Answers(1)[0];
    EXPECT_EQ(refused.id(), 65u);
    EXPECT_EQ(CodeOf(refused), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(refused.error().reason(), "STREAM_LIMIT");
    EXPECT_GT(refused.error().retry_delay_seconds(), 0.0);
  }
  caller.Answers(65);
  caller.Attend(66, RandomAttend(1));  // answered, but not sent
  EXPECT_EQ(caller.Answers(66)[65].error().reason(), "STREAM_LIMIT");
}

TEST_F(RequestStreamTest, AnAnswerThatIsSentMakesRoomAtOnce) {
  ServerOptions options = Options();
  options.limits.max_stream_requests = 1;
  ServerState state(options, BuiltInImplementations());
  Dispatcher dispatcher(state);
  Caller caller(state, dispatcher);
  // The caller's next request arrives before the thread that answered the first is done with it.
  caller.OnAnswer([&] { caller.Attend(2, RandomAttend(2)); });
  caller.Attend(1, RandomAttend(1));
  auto answers = caller.AnswersById(2);
  EXPECT_TRUE(answers[1].has_attend());
  EXPECT_TRUE(answers[2].has_attend()) << answers[2].error().message();
}

TEST_F(RequestStreamTest, BeyondTheLimitOfBytesIsRefused) {
  ServerOptions options = Options();
  const proto::AttendRequest request = RandomAttend(1);
  options.limits.max_stream_bytes = request.ByteSizeLong() * 2 + 10;
  ServerState state(options, BuiltInImplementations());
  Dispatcher dispatcher(state);
  Caller caller(state, dispatcher);
  {
    DeviceBlock block(state);
    for (std::uint64_t id = 1; id <= 3; ++id) caller.Attend(id, request);
    EXPECT_EQ(caller.Answers(1)[0].error().reason(), "STREAM_LIMIT");
    EXPECT_GT(caller.Answers(1)[0].error().retry_delay_seconds(), 0.0);
    caller.Attend(4, RandomAttend(1, 8, 8));
    const proto::StreamResponse never = caller.Answers(2)[1];
    EXPECT_EQ(never.error().reason(), "STREAM_LIMIT");
    EXPECT_EQ(never.error().retry_delay_seconds(), 0.0);  // waiting does not help
  }
  auto answers = caller.AnswersById(4);
  EXPECT_TRUE(answers[1].has_attend() && answers[2].has_attend());
}

TEST_F(RequestStreamTest, ARequestsTimeoutEndsItWhereverItWaits) {
  Caller caller(state_, dispatcher_);
  const std::string session = OpenSession(dispatcher_);
  DeviceBlock block(state_);
  caller.Attend(1, At(session, 0, 1));
  caller.Attend(2, RandomAttend(2), 0.02);    // waits for the device
  caller.Attend(3, At(session, 1, 3), 0.02);  // waits for the session
  for (const proto::StreamResponse& answer : caller.Answers(2)) {
    EXPECT_GT(answer.id(), 1u);
    EXPECT_EQ(CodeOf(answer), absl::StatusCode::kDeadlineExceeded);
  }
  block.Release();
  EXPECT_TRUE(caller.Answers(3)[2].has_attend());
  caller.Attend(4, At(session, 1, 4), 1e300);
  EXPECT_TRUE(caller.Answers(4)[3].has_attend()) << "the late request has changed nothing";
}

TEST_F(RequestStreamTest, TheStreamsDeadlineBoundsThoseOfItsRequests) {
  Caller caller(state_, dispatcher_, Clock::now() + std::chrono::milliseconds(20));
  DeviceBlock block(state_);
  caller.Attend(1, RandomAttend(1));
  caller.Attend(2, RandomAttend(2), 3600.0);
  for (const proto::StreamResponse& answer : caller.Answers(2)) {
    EXPECT_EQ(CodeOf(answer), absl::StatusCode::kDeadlineExceeded);
  }
}

TEST_F(RequestStreamTest, ACancelledRequestIsAnsweredAndNothingElseIs) {
  Caller caller(state_, dispatcher_);
  const std::string session = OpenSession(dispatcher_);
  {
    DeviceBlock block(state_);
    caller.Attend(1, At(session, 0, 1));
    caller.Attend(2, At(session, 1, 2));
    caller.Attend(3, RandomAttend(3));
    caller.Cancel(2);
    caller.Cancel(3);
    caller.Cancel(3);
    caller.Cancel(99);
    auto answers = caller.AnswersById(2);
    EXPECT_EQ(CodeOf(answers[2]), absl::StatusCode::kCancelled);
    EXPECT_EQ(CodeOf(answers[3]), absl::StatusCode::kCancelled);
    caller.Attend(4, At(session, 1, 4));
  }
  auto answers = caller.AnswersById(4);
  EXPECT_TRUE(answers[1].has_attend());
  EXPECT_TRUE(answers[4].has_attend()) << answers[4].error().message();
  caller.Cancel(1);  // answered
  caller.Attend(5, RandomAttend(5));
  caller.Answers(5);
}

TEST_F(RequestStreamTest, WhenTheCallerVanishesItsRequestsAreCancelledAndItsSessionsStay) {
  Caller caller(state_, dispatcher_);
  const std::string session = OpenSession(dispatcher_);
  ASSERT_TRUE(Call(dispatcher_, rpcs::kAttend, At(session, 0, 1)).status.ok());
  {
    DeviceBlock block(state_);
    for (std::uint64_t id = 1; id <= 8; ++id) {
      caller.Attend(id, At(session, static_cast<std::int64_t>(id), static_cast<unsigned>(id)));
    }
    caller.stream().Cancel();
    caller.Attend(9, RandomAttend(9));  // was on its way
    for (const proto::StreamResponse& answer : caller.Answers(9)) {
      EXPECT_EQ(CodeOf(answer), absl::StatusCode::kCancelled) << answer.id();
    }
  }
  EXPECT_TRUE(Call(dispatcher_, rpcs::kAttend, At(session, 1, 1)).status.ok());
  EXPECT_EQ(state_.lanes().waiting(), 0u);
}

TEST_F(RequestStreamTest, BrokenMessagesEndNeitherTheStreamNorItsRequests) {
  Caller caller(state_, dispatcher_);
  DeviceBlock block(state_);
  caller.Attend(1, RandomAttend(1));
  proto::StreamRequest empty;
  empty.set_id(2);
  EXPECT_TRUE(caller.Send(empty));
  EXPECT_TRUE(caller.stream().OnMessage(BytesOf(std::string(100, '\xff'))));
  proto::StreamRequest whole;
  whole.set_id(3);
  *whole.mutable_attend() = RandomAttend(3);
  const std::string bytes = whole.SerializeAsString();
  EXPECT_TRUE(caller.stream().OnMessage(BytesOf(bytes.substr(0, bytes.size() - 5))));
  // The envelope is whole, the request inside is not.
  EXPECT_TRUE(caller.stream().OnMessage(BytesOf(std::string("\x08\x04\x2a\x01\xff", 5))));
  for (const proto::StreamResponse& answer : caller.Answers(4)) {
    EXPECT_EQ(CodeOf(answer), absl::StatusCode::kInvalidArgument);
  }
  block.Release();
  EXPECT_EQ(caller.Answers(5)[4].id(), 1u);
  EXPECT_TRUE(caller.Answers(5)[4].has_attend());
}

}  // namespace
}  // namespace attn::server
