// Functions at given times: order, cancellation, the timer's end.
#include "server/timer.h"

#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <vector>

namespace attn::server {
namespace {

using std::chrono::milliseconds;

// Runs what has come due until now: functions that are due run in the order of their times.
void Settle(Timer& timer) {
  std::promise<void> done;
  timer.At(Clock::now(), [&] { done.set_value(); });
  done.get_future().wait();
}

TEST(TimerTest, WhatIsDueRunsInTheOrderOfItsTimes) {
  Timer timer;
  std::vector<int> order;
  std::promise<void> last;
  const Clock::time_point now = Clock::now();
  timer.At(now + milliseconds(30), [&] {
    order.push_back(3);
    last.set_value();
  });
  timer.At(now + milliseconds(20), [&] { order.push_back(2); });
  timer.At(now + milliseconds(20), [&] { order.push_back(20); });  // as they were given
  timer.At(now + milliseconds(10), [&] { order.push_back(1); });
  last.get_future().wait();
  EXPECT_GE(Clock::now(), now + milliseconds(30));
  EXPECT_EQ(order, (std::vector<int>{1, 2, 20, 3}));
}

TEST(TimerTest, AnEarlierTimeWakesATimerThatWaitsForALaterOne) {
  Timer timer;
  timer.At(Clock::now() + std::chrono::hours(1000), [] { FAIL(); });
  Settle(timer);
  timer.At(Clock::time_point::max(), [] { FAIL(); });
  Settle(timer);
}

TEST(TimerTest, WhatIsCancelledDoesNotRunAndIsFreed) {
  Timer timer;
  const auto held = std::make_shared<int>(0);
  const Clock::time_point later = Clock::now() + std::chrono::hours(1);
  const Timer::Id first = timer.At(later, [held] { FAIL(); });
  const Timer::Id second = timer.At(later, [held] {});
  timer.Cancel(first);
  EXPECT_EQ(held.use_count(), 2);
  timer.Cancel(first);
  timer.Cancel(second);
  EXPECT_EQ(held.use_count(), 1);
}

TEST(TimerTest, AFunctionMayUseTheTimerAndIsFreedWhenItHasRun) {
  Timer timer;
  const auto held = std::make_shared<int>(0);
  std::promise<void> done;
  Timer::Id own;
  std::promise<void> known;
  own = timer.At(Clock::now(), [&, held] {
    known.get_future().wait();
    timer.Cancel(own);  // of what runs: nothing
    const Timer::Id never = timer.At(Clock::now(), [] { FAIL(); });
    timer.Cancel(never);
    timer.At(Clock::now(), [&] { done.set_value(); });
  });
  known.set_value();
  done.get_future().wait();
  Settle(timer);
  EXPECT_EQ(held.use_count(), 1);
}

TEST(TimerTest, WhatHasNotComeDueIsDroppedAtTheEnd) {
  const auto held = std::make_shared<int>(0);
  {
    Timer timer;
    timer.At(Clock::now() + std::chrono::hours(1), [held] { FAIL(); });
    EXPECT_EQ(held.use_count(), 2);
  }
  EXPECT_EQ(held.use_count(), 1);
}

}  // namespace
}  // namespace attn::server
