// Session rpcs and attention on sessions through the dispatcher: what they answer, what they
// refuse, and that refusals change nothing.
#include "server/session_handlers.h"

#include <gtest/gtest.h>

#include <set>

#include "core/error.h"
#include "tests/server/session_calls.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

constexpr std::uint64_t kCacheBytes = 384 << 10;
// Of SessionAttend's tokens: 8 dimensions of keys, 8 of values with room for 16.
constexpr std::uint64_t kBlockBytes = 2 * 64 * (8 + 16) * 4;

class SessionHandlersTest : public testing::Test {
 protected:
  ServerOptions Options() {
    ServerOptions options = SmallServer();
    options.limits.cache_bytes = kCacheBytes;
    options.sessions.now = [this] { return clock_.now(); };
    return options;
  }
  Reply Attend(const proto::AttendRequest& request) {
    return Call(dispatcher_, rpcs::kAttend, request);
  }
  proto::GetSessionResponse Get(const std::string& id) {
    proto::GetSessionRequest request;
    request.set_session_id(id);
    const Reply reply = Call(dispatcher_, rpcs::kGetSession, request);
    EXPECT_TRUE(reply.status.ok()) << reply.status;
    return reply.As<proto::GetSessionResponse>();
  }
  proto::ForkSessionRequest ForkOf(const std::string& id, std::uint32_t count) {
    proto::ForkSessionRequest request;
    request.set_session_id(id);
    request.set_count(count);
    return request;
  }
  absl::Status Close(const std::string& id) {
    proto::CloseSessionRequest request;
    request.set_session_id(id);
    return Call(dispatcher_, rpcs::kCloseSession, request).status;
  }
  void Load(const std::string& name) {
    proto::LoadModelRequest request;
    *request.mutable_spec() = SpecOf(name, 2, 8);
    ASSERT_TRUE(Call(dispatcher_, rpcs::kLoadModel, request).status.ok());
  }
  proto::ListSessionsResponse List(const std::string& model, std::uint32_t size,
                                   const std::string& token = "") {
    proto::ListSessionsRequest request;
    request.set_model(model);
    request.set_page_size(size);
    request.set_page_token(token);
    const Reply reply = Call(dispatcher_, rpcs::kListSessions, request);
    EXPECT_TRUE(reply.status.ok()) << reply.status;
    return reply.As<proto::ListSessionsResponse>();
  }
  static proto::SessionBatch& Batch(proto::AttendRequest& request) {
    return *request.mutable_past_key_value()->mutable_sessions();
  }
  static proto::AttendRequest WithModel(proto::AttendRequest request, const std::string& model) {
    request.mutable_layer()->set_model(model);
    return request;
  }
  static void ExpectNotFound(const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kNotFound) << status;
    EXPECT_EQ(ErrorReason(status), "SESSION_NOT_FOUND");
  }

  TestClock clock_;
  ServerState state_{Options(), BuiltInImplementations()};
  Dispatcher dispatcher_{state_};
};

TEST_F(SessionHandlersTest, TokensOfEarlierCallsAreSeen) {
  const std::vector<std::string> ids = {OpenSession(dispatcher_), OpenSession(dispatcher_)};
  std::vector<proto::AttendRequest> earlier;
  std::int64_t length = 0;
  for (const std::int64_t tokens : {5, 1, 70, 1, 3}) {
    const auto request = SessionAttend(ids, static_cast<unsigned>(tokens), tokens);
    const Reply reply = Attend(request);
    ASSERT_TRUE(reply.status.ok()) << reply.status;
    const auto response = reply.As<proto::AttendResponse>();
    const auto expected = Attend(WithoutSessions(earlier, request)).As<proto::AttendResponse>();
    EXPECT_TRUE(AllClose(ValuesOf(response.output()), ValuesOf(expected.output())));
    length += tokens;
    EXPECT_EQ(response.cache_length(0), length);
    EXPECT_EQ(response.cache_length(1), length);
    EXPECT_FALSE(response.has_present());
    earlier.push_back(request);
  }
  const proto::GetSessionResponse session = Get(ids[1]);
  ASSERT_EQ(session.layers_size(), 1);
  EXPECT_EQ(session.layers(0).length(), length);
  EXPECT_EQ(session.layers(0).first_position(), 0);
  EXPECT_EQ(session.layers(0).kind(), proto::ATTENTION_KIND_SELF);
  EXPECT_EQ(session.bytes(), 2 * kBlockBytes);
}

TEST_F(SessionHandlersTest, OpeningSaysHowLongItLivesAndInWhichEpoch) {
  proto::OpenSessionRequest request;
  request.set_time_to_live_seconds(12.5);
  const auto response =
      Call(dispatcher_, rpcs::kOpenSession, request).As<proto::OpenSessionResponse>();
  EXPECT_EQ(response.session_id().size(), 32u);
  EXPECT_EQ(response.time_to_live_seconds(), 12.5);
  EXPECT_EQ(response.server_epoch(), state_.epoch());
  clock_.Advance(4.0);
  EXPECT_EQ(Get(response.session_id()).idle_seconds(), 4.0);
  EXPECT_EQ(Get(response.session_id()).idle_seconds(), 0.0);  // it was touched
  EXPECT_EQ(Get(response.session_id()).time_to_live_seconds(), 12.5);
  request.set_cache_dtype(proto::DATA_TYPE_INT64);
  EXPECT_EQ(Call(dispatcher_, rpcs::kOpenSession, request).status.code(),
            absl::StatusCode::kInvalidArgument);
  request.set_cache_dtype(static_cast<proto::DataType>(99));
  EXPECT_EQ(ErrorDetailsOf(Call(dispatcher_, rpcs::kOpenSession, request).status)["field"],
            "cache_dtype");
  request.clear_cache_dtype();
  request.set_model("nobody");
  EXPECT_EQ(Call(dispatcher_, rpcs::kOpenSession, request).status.code(),
            absl::StatusCode::kNotFound);
}

TEST_F(SessionHandlersTest, ReadingNoSessionIsRefused) {
  for (const std::int64_t batch : {0, 1}) {
    proto::AttendRequest request = RandomAttend(1, batch);
    request.clear_key();
    request.clear_value();
    request.mutable_past_key_value()->mutable_sessions()->set_mode(proto::CACHE_MODE_READ_ONLY);
    const absl::Status status = Call(dispatcher_, rpcs::kAttend, request).status;
    EXPECT_EQ(ErrorDetailsOf(status)["field"], "past_key_value.sessions.session_ids") << status;
  }
}

TEST_F(SessionHandlersTest, EveryRpcRefusesWhatIsNotThere) {
  const std::string id = OpenSession(dispatcher_);
  std::string misspelt = id;
  misspelt[3] = misspelt[3] == 'a' ? 'b' : 'a';
  ASSERT_TRUE(Close(id).ok());
  const std::string expired = OpenSession(dispatcher_);
  clock_.Advance(1e5);
  for (const std::string& gone : {id, misspelt, expired, std::string()}) {
    ExpectNotFound(Close(gone));
    ExpectNotFound(Call(dispatcher_, rpcs::kForkSession, ForkOf(gone, 1)).status);
    proto::GetSessionRequest get;
    get.set_session_id(gone);
    ExpectNotFound(Call(dispatcher_, rpcs::kGetSession, get).status);
    ExpectNotFound(Attend(SessionAttend({gone}, 1)).status);
  }
  const absl::Status row = Attend(SessionAttend({OpenSession(dispatcher_), id}, 1)).status;
  ExpectNotFound(row);
  EXPECT_EQ(ErrorDetailsOf(row)["row"], "1");
}

TEST_F(SessionHandlersTest, ASessionOfAnotherModelLooksLikeNone) {
  Load("m");
  Load("n");
  const std::string of_m = OpenSession(dispatcher_, "m");
  const std::string of_none = OpenSession(dispatcher_);
  ExpectNotFound(Attend(SessionAttend({of_m}, 1)).status);
  ExpectNotFound(Attend(WithModel(SessionAttend({of_m}, 1), "n")).status);
  ExpectNotFound(Attend(WithModel(SessionAttend({of_none}, 1), "m")).status);
  EXPECT_TRUE(Attend(WithModel(SessionAttend({of_m}, 1), "m")).status.ok());
  EXPECT_EQ(Get(of_m).model(), "m");
}

TEST_F(SessionHandlersTest, OneBadRowFailsTheCallAndChangesNoSession) {
  const std::vector<std::string> ids = {OpenSession(dispatcher_), OpenSession(dispatcher_)};
  ASSERT_TRUE(Attend(SessionAttend(ids, 1, 3)).status.ok());
  const auto expect_unchanged = [&] {
    for (const std::string& id : ids) EXPECT_EQ(Get(id).layers(0).length(), 3);
    EXPECT_EQ(state_.sessions().cache().used(), 2 * kBlockBytes);
  };
  EXPECT_EQ(ErrorDetailsOf(Attend(SessionAttend({ids[0], ids[0]}, 2)).status)["field"],
            "past_key_value.sessions.session_ids");
  proto::AttendRequest request = SessionAttend(ids, 2, 2);
  Batch(request).add_cache_position(3);
  Batch(request).add_cache_position(4);
  EXPECT_EQ(Attend(request).status.code(), absl::StatusCode::kOutOfRange);
  Batch(request).set_cache_position(1, 2);
  const absl::Status below = Attend(request).status;
  EXPECT_EQ(below.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(ErrorDetailsOf(below)["length"], "3");
  Batch(request).clear_cache_position();
  Batch(request).add_truncate(0);
  EXPECT_EQ(Attend(request).status.code(), absl::StatusCode::kInvalidArgument);
  Batch(request).set_mode(static_cast<proto::CacheMode>(9));
  EXPECT_EQ(ErrorDetailsOf(Attend(request).status)["field"], "past_key_value.sessions.mode");
  expect_unchanged();
  // Beyond the budget: both rows need a block more, and only one is left.
  const auto rest = state_.sessions().Open(*state_.registry().Find(""), {});
  ASSERT_TRUE(rest.ok());
  const std::string filler = (*rest)->id();
  const auto blocks = static_cast<std::int64_t>(kCacheBytes / kBlockBytes) - 3;
  for (std::int64_t i = 0; i < blocks; ++i) {
    ASSERT_TRUE(Attend(SessionAttend({filler}, 3, 64)).status.ok());
  }
  const std::uint64_t used = state_.sessions().cache().used();
  const absl::Status full = Attend(SessionAttend(ids, 4, 64)).status;
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(full), "CACHE_BUDGET");
  EXPECT_EQ(state_.sessions().cache().used(), used);
  ASSERT_TRUE(Close(filler).ok());
  expect_unchanged();
  EXPECT_TRUE(Attend(SessionAttend(ids, 4, 64)).status.ok());
}

TEST_F(SessionHandlersTest, AnAnswerThatIsTooLargeIsRefusedBeforeAnythingChanges) {
  const std::string id = OpenSession(dispatcher_);
  proto::AttendRequest request = SessionAttend({id}, 1, 500);
  request.set_output_attentions(true);  // 2 * 500 * 500 * 4 bytes
  const absl::Status status = Attend(request).status;
  EXPECT_EQ(ErrorReason(status), "ANSWER_TOO_LARGE");
  EXPECT_EQ(Get(id).layers_size(), 0);
}

TEST_F(SessionHandlersTest, ForksContinueApart) {
  const std::string id = OpenSession(dispatcher_);
  const auto first = SessionAttend({id}, 1, 70);
  ASSERT_TRUE(Attend(first).status.ok());
  proto::ForkSessionRequest fork = ForkOf(id, 2);
  const auto forks = Call(dispatcher_, rpcs::kForkSession, fork).As<proto::ForkSessionResponse>();
  ASSERT_EQ(forks.session_ids_size(), 2);
  EXPECT_EQ(state_.sessions().cache().blocks(), 2u);
  for (int i = 0; i < 2; ++i) {
    const auto next = SessionAttend({forks.session_ids(i)}, 10 + static_cast<unsigned>(i), 2);
    const auto got = Attend(next).As<proto::AttendResponse>();
    const auto expected = Attend(WithoutSessions({first}, next)).As<proto::AttendResponse>();
    EXPECT_TRUE(AllClose(ValuesOf(got.output()), ValuesOf(expected.output())));
  }
  EXPECT_EQ(Get(id).layers(0).length(), 70);
  fork.set_length(64);
  fork.clear_count();
  const auto shorter = Call(dispatcher_, rpcs::kForkSession, fork).As<proto::ForkSessionResponse>();
  ASSERT_EQ(shorter.session_ids_size(), 1);
  EXPECT_EQ(Get(shorter.session_ids(0)).layers(0).length(), 64);
  fork.set_length(-1);
  EXPECT_EQ(ErrorDetailsOf(Call(dispatcher_, rpcs::kForkSession, fork).status)["field"], "length");
}

TEST_F(SessionHandlersTest, ARetryGivesTheSameAnswerAndALateDuplicateNone) {
  const std::string id = OpenSession(dispatcher_);
  proto::AttendRequest one = SessionAttend({id}, 1, 3);
  Batch(one).add_step(1);
  ASSERT_TRUE(Attend(one).status.ok());
  proto::AttendRequest two = SessionAttend({id}, 2, 2);
  Batch(two).add_step(2);
  const auto before = Attend(two).As<proto::AttendResponse>();
  const auto again = Attend(two).As<proto::AttendResponse>();
  EXPECT_EQ(before.output().data(), again.output().data());
  EXPECT_EQ(again.cache_length(0), 5);
  const absl::Status late = Attend(one).status;
  EXPECT_EQ(ErrorReason(late), "LATE_STEP");
  EXPECT_EQ(ErrorDetailsOf(late)["step"], "2");
  EXPECT_EQ(Get(id).layers(0).last_step(), 2u);
}

TEST_F(SessionHandlersTest, WhatIsCancelledInTheQueueHasChangedNothing) {
  const std::string id = OpenSession(dispatcher_);
  ASSERT_TRUE(Attend(SessionAttend({id}, 1, 3)).status.ok());
  const auto context = std::make_shared<CallContext>();
  DeviceBlock block(state_);
  std::future<Reply> running =
      CallLater(dispatcher_, rpcs::kAttend, SessionAttend({id}, 2), context);
  std::future<Reply> behind = CallLater(dispatcher_, rpcs::kAttend, SessionAttend({id}, 3));
  EXPECT_EQ(state_.lanes().waiting(), 1u);
  context->Cancel();
  EXPECT_EQ(running.get().status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(state_.lanes().waiting(), 0u);
  block.Release();
  EXPECT_EQ(behind.get().As<proto::AttendResponse>().cache_length(0), 4);
}

TEST_F(SessionHandlersTest, AModelIsUnloadedWithItsSessionsOrNotAtAll) {
  Load("m");
  const std::string id = OpenSession(dispatcher_, "m");
  const std::string other = OpenSession(dispatcher_);
  const auto request = WithModel(SessionAttend({id}, 1, 3), "m");
  ASSERT_TRUE(Attend(request).status.ok());
  proto::UnloadModelRequest unload;
  unload.set_model("m");
  const absl::Status refused = Call(dispatcher_, rpcs::kUnloadModel, unload).status;
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ErrorReason(refused), "MODEL_HAS_SESSIONS");
  EXPECT_TRUE(Attend(request).status.ok());
  unload.set_close_sessions(true);
  std::future<Reply> running;
  std::future<Reply> waiting;
  {
    DeviceBlock block(state_);
    running = CallLater(dispatcher_, rpcs::kAttend, request);
    waiting = CallLater(dispatcher_, rpcs::kAttend, request);
    EXPECT_TRUE(Call(dispatcher_, rpcs::kUnloadModel, unload).status.ok());
  }
  EXPECT_TRUE(running.get().status.ok());  // it had its turn
  ExpectNotFound(waiting.get().status);
  EXPECT_EQ(state_.sessions().cache().used(), 0u);
  EXPECT_EQ(state_.sessions().size(), 1u);
  Load("m");
  ExpectNotFound(Attend(request).status);
  EXPECT_EQ(Get(other).layers_size(), 0);
}

TEST_F(SessionHandlersTest, SessionsAreListedPageByPageWithoutTheirIds) {
  Load("m");
  std::vector<std::string> ids;
  for (int i = 0; i < 5; ++i) {
    ids.push_back(OpenSession(dispatcher_, i % 2 == 0 ? "m" : ""));
    clock_.Advance(1.0);
  }
  ASSERT_TRUE(Attend(WithModel(SessionAttend({ids[0]}, 1, 3), "m")).status.ok());
  std::vector<proto::SessionStatus> all;
  std::string token;
  int pages = 0;
  do {
    const proto::ListSessionsResponse page = List("", 2, token);
    all.insert(all.end(), page.sessions().begin(), page.sessions().end());
    token = page.next_page_token();
    ++pages;
  } while (!token.empty());
  EXPECT_EQ(pages, 3);
  ASSERT_EQ(all.size(), 5u);
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(all[i].id_prefix(), ids[i].substr(0, 8));
    EXPECT_EQ(all[i].model(), i % 2 == 0 ? "m" : "");
    EXPECT_EQ(all[i].age_seconds(), static_cast<double>(5 - i));
  }
  EXPECT_EQ(all[0].length(), 3);
  EXPECT_EQ(all[0].bytes(), kBlockBytes);
  EXPECT_EQ(all[0].idle_seconds(), 0.0);
  EXPECT_EQ(all[1].idle_seconds(), 4.0);  // listing touches nothing
  EXPECT_EQ(List("m", 0).sessions_size(), 3);
  proto::ListSessionsRequest request;
  request.set_page_token("-1");
  EXPECT_EQ(ErrorDetailsOf(Call(dispatcher_, rpcs::kListSessions, request).status)["field"],
            "page_token");
  request.set_page_token("");
  request.set_model("nobody");
  EXPECT_EQ(Call(dispatcher_, rpcs::kListSessions, request).status.code(),
            absl::StatusCode::kNotFound);
}

TEST_F(SessionHandlersTest, WhatIsIdleForTooLongExpiresAndAllThatNamesItTouchesIt) {
  proto::OpenSessionRequest open;
  open.set_time_to_live_seconds(10.0);
  const auto id =
      Call(dispatcher_, rpcs::kOpenSession, open).As<proto::OpenSessionResponse>().session_id();
  ASSERT_TRUE(Attend(SessionAttend({id}, 1, 3)).status.ok());
  for (int i = 0; i < 3; ++i) {
    clock_.Advance(8.0);
    if (i == 0) Get(id);
    if (i == 1) {
      EXPECT_TRUE(Attend(SessionAttend({id}, 1)).status.ok());
    }
    if (i == 2) {
      EXPECT_TRUE(Call(dispatcher_, rpcs::kForkSession, ForkOf(id, 1)).status.ok());
    }
  }
  {
    DeviceBlock block(state_);
    const auto running = CallLater(dispatcher_, rpcs::kAttend, SessionAttend({id}, 2));
    clock_.Advance(100.0);  // while a call runs it is not idle; the fork is
    state_.sessions().Expire();
    EXPECT_EQ(state_.sessions().size(), 1u);
    block.Release();
    running.wait();
  }
  // The turn ended before its caller was told.
  clock_.Advance(11.0);
  state_.sessions().Expire();
  EXPECT_EQ(state_.sessions().size(), 0u);
  EXPECT_EQ(state_.sessions().cache().used(), 0u);
}

}  // namespace
}  // namespace attn::server
