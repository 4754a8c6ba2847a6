// The order of calls that name sessions: turns, cancellation, capacity, sessions that end.
#include "server/session_lanes.h"

#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "core/error.h"
#include "tests/core/session_fixture.h"

namespace attn::server {
namespace {

class SessionLanesTest : public ::testing::Test {
 protected:
  using Sessions = std::vector<std::shared_ptr<Session>>;
  // What became of a call.
  struct Visit {
    std::shared_ptr<CallContext> context = std::make_shared<CallContext>();
    std::shared_ptr<SessionLanes::Turn> turn;  // while it lasts
    bool started = false;
    absl::Status dropped;
  };

  std::shared_ptr<Visit> Enter(const Sessions& sessions, std::shared_ptr<CallContext> context =
                                                             std::make_shared<CallContext>()) {
    auto visit = std::make_shared<Visit>();
    visit->context = std::move(context);
    lanes_.Enter(
        sessions, visit->context,
        [visit](std::shared_ptr<SessionLanes::Turn> turn) {
          EXPECT_FALSE(visit->started);
          visit->started = true;
          visit->turn = std::move(turn);
        },
        [visit](absl::Status status) {
          EXPECT_FALSE(visit->started);
          EXPECT_TRUE(visit->dropped.ok());
          EXPECT_FALSE(status.ok());
          visit->dropped = std::move(status);
        });
    return visit;
  }
  void Close(const std::shared_ptr<Session>& session) { fixture_.table().Close(*session); }

  attn::testing::SessionFixture fixture_{1 << 20};
  SessionLanes lanes_{fixture_.table(), 3};
  const std::shared_ptr<Session> a_ = fixture_.Open("");
  const std::shared_ptr<Session> b_ = fixture_.Open("");
  const std::shared_ptr<Session> c_ = fixture_.Open("");
};

TEST_F(SessionLanesTest, CallsOnASessionHaveTheirTurnsInTheOrderOfArrival) {
  const auto first = Enter({a_});
  const auto second = Enter({a_});
  const auto third = Enter({a_});
  const auto other = Enter({b_});
  EXPECT_TRUE(first->started);
  EXPECT_TRUE(other->started);
  EXPECT_FALSE(second->started);
  EXPECT_EQ(first->turn->sessions(), (Sessions{a_}));
  EXPECT_EQ(lanes_.waiting(), 2u);
  first->turn.reset();
  EXPECT_TRUE(second->started);
  EXPECT_FALSE(third->started);
  second->turn.reset();
  EXPECT_TRUE(third->started);
  EXPECT_EQ(lanes_.waiting(), 0u);
}

TEST_F(SessionLanesTest, ACallOverSeveralSessionsWaitsForAllAndHoldsAll) {
  const auto on_a = Enter({a_});
  const auto on_b = Enter({b_});
  const auto both = Enter({a_, b_});
  const auto behind = Enter({b_, c_});
  on_a->turn.reset();
  EXPECT_FALSE(both->started);
  on_b->turn.reset();
  EXPECT_TRUE(both->started);
  EXPECT_FALSE(behind->started);  // though c is free
  both->turn.reset();
  EXPECT_TRUE(behind->started);
}

TEST_F(SessionLanesTest, TwoCallsOverTheSameSessionsInOtherOrdersDoNotBlockEachOther) {
  const auto first = Enter({a_, b_});
  const auto second = Enter({b_, a_});
  const auto third = Enter({a_, b_});
  first->turn.reset();
  EXPECT_TRUE(second->started);
  EXPECT_FALSE(third->started);
  second->turn.reset();
  EXPECT_TRUE(third->started);
}

TEST_F(SessionLanesTest, ACancelledWaitingCallIsAnsweredAtOnceAndItsSuccessorsGoOn) {
  const auto running = Enter({a_});
  const auto waiting = Enter({a_, b_});
  const auto behind_b = Enter({b_});
  const auto behind_a = Enter({a_});
  waiting->context->Cancel();
  EXPECT_EQ(waiting->dropped.code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(behind_b->started);
  EXPECT_FALSE(behind_a->started);
  EXPECT_EQ(lanes_.waiting(), 1u);
  running->turn.reset();
  EXPECT_TRUE(behind_a->started);
  EXPECT_FALSE(waiting->started);
}

TEST_F(SessionLanesTest, ACallThatIsNotWantedWhenItsTurnComesIsDropped) {
  const auto late = std::make_shared<CallContext>(Clock::now() - std::chrono::seconds(1));
  const auto gone = std::make_shared<CallContext>();
  gone->Cancel();
  EXPECT_EQ(Enter({a_}, late)->dropped.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(Enter({a_}, gone)->dropped.code(), absl::StatusCode::kCancelled);
  const auto running = Enter({a_});
  EXPECT_EQ(Enter({a_}, gone)->dropped.code(), absl::StatusCode::kCancelled);
  const auto expired = Enter({a_}, late);
  const auto next = Enter({a_});
  running->turn.reset();
  EXPECT_EQ(expired->dropped.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(next->started);
  // A call that has its turn is not the lanes' to drop.
  next->context->Cancel();
  EXPECT_TRUE(next->dropped.ok());
  EXPECT_NE(next->turn, nullptr);
}

TEST_F(SessionLanesTest, TooManyWaitingCallsAreShed) {
  const auto running = Enter({a_});
  std::vector<std::shared_ptr<Visit>> waiting;
  for (int i = 0; i < 3; ++i) waiting.push_back(Enter({a_}));
  const auto shed = Enter({a_, b_});
  EXPECT_EQ(shed->dropped.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(shed->dropped), "QUEUE_FULL");
  EXPECT_GT(RetryDelay(shed->dropped), 0.0);
  EXPECT_TRUE(Enter({b_})->started);  // one that need not wait is not in the way
  waiting[1]->context->Cancel();
  const auto again = Enter({a_});
  EXPECT_TRUE(again->dropped.ok());
  running->turn.reset();
  EXPECT_TRUE(waiting[0]->started);
  waiting[0]->turn.reset();
  EXPECT_TRUE(waiting[2]->started);
}

TEST_F(SessionLanesTest, AShedCallLeavesItsSessionsAsTheyWere) {
  const auto running = Enter({a_});
  std::vector<std::shared_ptr<Visit>> waiting;
  for (int i = 0; i < 4; ++i) waiting.push_back(Enter({a_, b_}));
  EXPECT_FALSE(waiting[3]->dropped.ok());
  for (const auto& visit : waiting) visit->context->Cancel();
  fixture_.Advance(1e6);
  EXPECT_GT(b_->idle_seconds(fixture_.now()), 0.0);  // not in use by anybody
  EXPECT_EQ(a_->idle_seconds(fixture_.now()), 0.0);
}

TEST_F(SessionLanesTest, WhoeverWaitsForASessionThatIsClosedIsTold) {
  const auto closing = Enter({a_});
  const auto waiting = Enter({b_, a_});
  const auto behind = Enter({b_});
  Close(a_);
  const auto late = Enter({a_});
  EXPECT_EQ(late->dropped, SessionTable::NotFound());
  closing->turn.reset();
  EXPECT_EQ(waiting->dropped, SessionTable::NotFound());
  EXPECT_TRUE(behind->started);
  EXPECT_EQ(Enter({b_, a_})->dropped, SessionTable::NotFound());
}

TEST_F(SessionLanesTest, NothingExpiresWhileACallRunsOrWaits) {
  const auto running = Enter({a_});
  const auto waiting = Enter({a_, b_});
  fixture_.Advance(1e6);
  fixture_.table().Expire();
  EXPECT_EQ(fixture_.table().size(), 2u);  // c was idle
  running->turn.reset();
  EXPECT_TRUE(waiting->started);
  waiting->turn.reset();
  fixture_.Advance(1e6);
  fixture_.table().Expire();
  EXPECT_EQ(fixture_.table().size(), 0u);
}

TEST_F(SessionLanesTest, ALongQueueOfShortCallsIsNoDeepStack) {
  SessionLanes lanes(fixture_.table(), 200000);
  std::shared_ptr<SessionLanes::Turn> first;
  int started = 0;
  for (int i = 0; i < 100000; ++i) {
    lanes.Enter(
        {a_}, std::make_shared<CallContext>(),
        [&](std::shared_ptr<SessionLanes::Turn> turn) {
          if (++started == 1) first = std::move(turn);  // the others end at once
        },
        [](absl::Status) { FAIL(); });
  }
  EXPECT_EQ(started, 1);
  first.reset();
  EXPECT_EQ(started, 100000);
}

TEST_F(SessionLanesTest, FromManyThreadsTurnsNeverOverlapAndEveryCallIsAnsweredOnce) {
  constexpr int kThreads = 4;
  constexpr int kCallsEach = 3000;
  SessionLanes lanes(fixture_.table(), 64);
  const Sessions sessions = {a_, b_, c_};
  std::array<std::atomic<int>, 3> inside{};
  std::atomic<int> answered{0};
  std::atomic<int> started{0};
  std::atomic<int> overlaps{0};
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937 random(thread);
      for (int i = 0; i < kCallsEach; ++i) {
        std::vector<std::size_t> chosen;
        for (std::size_t s = 0; s < 3; ++s) {
          if (random() % 2 == 0)
            chosen.insert(chosen.begin() + (random() % 2 ? 0 : chosen.size()), s);
        }
        if (chosen.empty()) chosen.push_back(random() % 3);
        Sessions mine;
        for (const std::size_t s : chosen) mine.push_back(sessions[s]);
        const auto context = std::make_shared<CallContext>();
        lanes.Enter(
            mine, context,
            [&, chosen](std::shared_ptr<SessionLanes::Turn> turn) {
              for (const std::size_t s : chosen) overlaps += inside[s]++ == 0 ? 0 : 1;
              for (const std::size_t s : chosen) --inside[s];
              ++started;
              turn.reset();
              ++answered;
            },
            [&](const absl::Status& status) {
              EXPECT_TRUE(status.code() == absl::StatusCode::kCancelled ||
                          status.code() == absl::StatusCode::kResourceExhausted)
                  << status;
              ++answered;
            });
        if (random() % 3 == 0) context->Cancel();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(answered, kThreads * kCallsEach);
  EXPECT_EQ(overlaps, 0);
  EXPECT_GT(started, 0);
  EXPECT_EQ(lanes.waiting(), 0u);
  fixture_.Advance(1.0);
  for (const auto& session : sessions) EXPECT_EQ(session->idle_seconds(fixture_.now()), 1.0);
}

}  // namespace
}  // namespace attn::server
