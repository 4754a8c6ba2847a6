// Threads that hammer shared forks through the handlers, while others look at them, switch
// implementations and unload the model under them. What is determined is checked; at the end no
// page is left. Runs under the thread sanitizer.
#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>

#include "core/error.h"
#include "tests/server/session_calls.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

constexpr int kPrefixTokens = 70;  // ends within a page
constexpr int kRounds = 60;
constexpr int kStepsEach = 8;

ServerOptions Options() {
  ServerOptions options = SmallServer();
  options.limits.queue_capacity = 256;
  options.limits.cache_bytes = 64 << 20;
  return options;
}

class SessionHammerTest : public testing::Test {
 protected:
  void Load() {
    proto::LoadModelRequest load;
    *load.mutable_spec() = SpecOf("m", 2, 8);
    EXPECT_TRUE(Call(dispatcher_, rpcs::kLoadModel, load).status.ok());
  }
  void Fail(const std::string& what) {
    ++failures_;
    ADD_FAILURE() << what;
  }
  std::string Fork(const std::string& id) {
    proto::ForkSessionRequest request;
    request.set_session_id(id);
    const Reply reply = Call(dispatcher_, rpcs::kForkSession, request);
    if (!reply.status.ok()) Fail("fork: " + reply.status.ToString());
    const auto forks = reply.As<proto::ForkSessionResponse>();
    return forks.session_ids_size() == 1 ? forks.session_ids(0) : "";
  }
  absl::Status Close(const std::string& id) {
    proto::CloseSessionRequest request;
    request.set_session_id(id);
    return Call(dispatcher_, rpcs::kCloseSession, request).status;
  }
  // A fork of the shared session, whose every answer is known.
  void RunFork(const std::string& shared, const proto::AttendRequest& prefix, unsigned seed);
  void Look();
  void Switch(int round);

  ServerState state_{Options(), BuiltInImplementations()};
  Dispatcher dispatcher_{state_};
  std::atomic<int> failures_{0};
  std::atomic<int> busy_{0};  // threads that change sessions
};

void SessionHammerTest::RunFork(const std::string& shared, const proto::AttendRequest& prefix,
                                unsigned seed) {
  std::mt19937 random(seed);
  const std::string id = Fork(shared);
  std::vector<proto::AttendRequest> earlier = {prefix};
  std::int64_t length = kPrefixTokens;
  for (int i = 1; i <= kStepsEach; ++i) {
    proto::AttendRequest request =
        SessionAttend({id}, static_cast<unsigned>(random()), 1 + static_cast<int>(random() % 3));
    proto::SessionBatch& batch = *request.mutable_past_key_value()->mutable_sessions();
    batch.add_cache_position(length);
    if (random() % 3 == 0) {  // is not kept
      batch.set_mode(proto::CACHE_MODE_DISCARD);
      if (!Call(dispatcher_, rpcs::kAttend, request).status.ok()) Fail("discard");
      batch.set_mode(proto::CACHE_MODE_APPEND);
    }
    batch.add_step(static_cast<std::uint64_t>(i));
    if (random() % 3 == 0) {  // given up at a moment that is anybody's guess, then sent again
      const auto context = std::make_shared<CallContext>();
      std::future<Reply> reply = CallLater(dispatcher_, rpcs::kAttend, request, context);
      context->Cancel();
      const absl::StatusCode code = reply.get().status.code();
      if (code != absl::StatusCode::kOk && code != absl::StatusCode::kCancelled) Fail("cancelled");
    }
    const Reply first = Call(dispatcher_, rpcs::kAttend, request);
    const Reply retry = Call(dispatcher_, rpcs::kAttend, request);
    if (!first.status.ok() || !retry.status.ok()) return Fail(first.status.ToString());
    const auto expected = Call(dispatcher_, rpcs::kAttend, WithoutSessions(earlier, request))
                              .As<proto::AttendResponse>();
    for (const Reply* reply : {&first, &retry}) {
      const auto response = reply->As<proto::AttendResponse>();
      if (!AllClose(ValuesOf(response.output()), ValuesOf(expected.output()))) Fail("output");
      if (response.cache_length(0) != length + request.key().shape(2)) Fail("length");
    }
    length += request.key().shape(2);
    request.clear_past_key_value();
    earlier.push_back(std::move(request));
  }
  if (!Close(id).ok()) Fail("close");
}

// Everything that only reads.
void SessionHammerTest::Look() {
  proto::ListSessionsRequest list;
  list.set_page_size(3);
  const auto page = Call(dispatcher_, rpcs::kListSessions, list).As<proto::ListSessionsResponse>();
  list.set_page_token(page.next_page_token());
  if (!Call(dispatcher_, rpcs::kListSessions, list).status.ok()) Fail("list");
  for (const SessionTable::Listed& listed : state_.sessions().List(std::nullopt, 0, 4)) {
    proto::GetSessionRequest get;
    get.set_session_id(listed.session->id());
    const Reply reply = Call(dispatcher_, rpcs::kGetSession, get);
    if (!reply.status.ok() && reply.status.code() != absl::StatusCode::kNotFound) Fail("get");
  }
  Call(dispatcher_, rpcs::kListModels, proto::ListModelsRequest());
  StateCollector(state_).Collect();
  state_.metrics().registry()->Collect();
  state_.sessions().Expire();
}

void SessionHammerTest::Switch(int round) {
  proto::SwitchAttentionRequest change;
  change.set_implementation(round % 2 == 0 ? "standard" : "torch_sdpa");
  if (!Call(dispatcher_, rpcs::kSwitchAttention, change).status.ok()) Fail("switch");
}

TEST_F(SessionHammerTest, ForksOfASharedSessionNeverSeeEachOther) {
  const std::string shared = OpenSession(dispatcher_);
  const proto::AttendRequest prefix = SessionAttend({shared}, 1, kPrefixTokens);
  ASSERT_TRUE(Call(dispatcher_, rpcs::kAttend, prefix).status.ok());
  busy_ = 3;
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&, thread] {
      for (unsigned i = 0; i < kRounds / 3 && failures_ == 0; ++i) {
        RunFork(shared, prefix, thread * 1000 + i);
      }
      --busy_;
    });
  }
  threads.emplace_back([&] {
    for (int round = 0; busy_ > 0; ++round) {
      Look();
      Switch(round);
    }
  });
  // One that writes to the shared session itself, and takes it back: forks are made at its prefix.
  std::thread writer([&] {
    for (unsigned i = 0; busy_ > 0; ++i) {
      proto::AttendRequest request = SessionAttend({shared}, i);
      request.mutable_past_key_value()->mutable_sessions()->set_mode(proto::CACHE_MODE_DISCARD);
      if (!Call(dispatcher_, rpcs::kAttend, request).status.ok()) Fail("writer");
    }
  });
  for (std::thread& thread : threads) thread.join();
  writer.join();
  EXPECT_EQ(failures_, 0);
  EXPECT_EQ(state_.sessions().size(), 1u);
  EXPECT_TRUE(Close(shared).ok());
  EXPECT_EQ(state_.sessions().cache().used(), 0u);
  EXPECT_EQ(state_.sessions().cache().blocks(), 0u);
  EXPECT_EQ(state_.lanes().waiting(), 0u);
}

TEST_F(SessionHammerTest, AModelIsUnloadedUnderItsSessionsAgainAndAgain) {
  Load();
  busy_ = 1;
  std::atomic<int> answered{0};
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937 random(thread);
      const auto expected = [&](const absl::Status& status) {
        ++answered;
        if (status.ok() || status.code() == absl::StatusCode::kNotFound) return;
        Fail(status.ToString());
      };
      while (busy_ > 0) {
        proto::OpenSessionRequest open;
        open.set_model("m");
        open.set_reserve_tokens(random() % 2 == 0 ? 100 : 0);
        const Reply opened = Call(dispatcher_, rpcs::kOpenSession, open);
        expected(opened.status);
        if (!opened.status.ok()) continue;
        const std::string id = opened.As<proto::OpenSessionResponse>().session_id();
        proto::AttendRequest request = SessionAttend({id}, static_cast<unsigned>(random()), 3);
        request.mutable_layer()->set_model("m");
        std::vector<std::future<Reply>> replies;
        for (int i = 0; i < 3; ++i) {
          replies.push_back(CallLater(dispatcher_, rpcs::kAttend, request));
        }
        proto::ForkSessionRequest fork;
        fork.set_session_id(id);
        fork.set_count(2);
        replies.push_back(CallLater(dispatcher_, rpcs::kForkSession, fork));
        for (std::future<Reply>& reply : replies) expected(reply.get().status);
        if (random() % 2 == 0) expected(Close(id));
      }
    });
  }
  threads.emplace_back([&] {
    while (busy_ > 0) Look();
  });
  proto::UnloadModelRequest unload;
  unload.set_model("m");
  unload.set_close_sessions(true);
  for (int i = 0; i < kRounds; ++i) {
    const int before = answered;
    while (answered < before + 5) std::this_thread::yield();
    EXPECT_TRUE(Call(dispatcher_, rpcs::kUnloadModel, unload).status.ok());
    if (i + 1 < kRounds) Load();
  }
  busy_ = 0;
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures_, 0);
  EXPECT_EQ(state_.sessions().size(), 0u);
  EXPECT_EQ(state_.sessions().cache().used(), 0u);
  EXPECT_EQ(state_.sessions().cache().blocks(), 0u);
}

}  // namespace
}  // namespace attn::server
