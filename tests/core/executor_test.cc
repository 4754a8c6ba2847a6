#include "core/executor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <thread>
#include <vector>

namespace attn {
namespace {

TEST(ExecutorTest, RunsJobsInOrder) {
  Executor executor(Executor::Options{2, 0, nullptr});
  std::vector<int> order;
  for (int i = 0; i < 100; ++i) executor.Post([&order, i] { order.push_back(i); });
  executor.Run([] {});
  std::vector<int> expected(100);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(order, expected);
}

TEST(ExecutorTest, FinishesPostedJobsBeforeItEnds) {
  std::atomic<int> done{0};
  {
    Executor executor(Executor::Options{1, 0, nullptr});
    for (int i = 0; i < 50; ++i) executor.Post([&] { ++done; });
  }
  EXPECT_EQ(done, 50);
}

class ParallelForTest : public testing::TestWithParam<int> {};

TEST_P(ParallelForTest, RunsEveryTaskOnceAndOneAtATimeOnEachWorker) {
  const int threads = GetParam();
  Executor executor(Executor::Options{threads, 20, nullptr});
  for (std::int64_t tasks : {0, 1, 2, 3, 17, 1000}) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
      // As many as there may be numbers: one beyond them is found by the address sanitizer too.
      std::vector<std::atomic<int>> inside(
          static_cast<std::size_t>(std::min<std::int64_t>(threads, tasks)));
      std::atomic<bool> beyond{false};
      std::atomic<bool> overlapped{false};
      executor.Run([&] {
        EXPECT_TRUE(executor.OnDriver());
        executor.ParallelFor(tasks, [&](std::int64_t index, int worker) {
          if (worker >= threads || worker >= tasks) {
            beyond = true;
            return;
          }
          if (inside[static_cast<std::size_t>(worker)].fetch_add(1) != 0) overlapped = true;
          runs[static_cast<std::size_t>(index)].fetch_add(1);
          inside[static_cast<std::size_t>(worker)].fetch_sub(1);
        });
      });
      EXPECT_TRUE(std::all_of(runs.begin(), runs.end(), [](const auto& run) { return run == 1; }));
      EXPECT_FALSE(overlapped);
      EXPECT_FALSE(beyond);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Threads, ParallelForTest, testing::Values(1, 2, 3, 8));

// Callers keep memory for as many workers as there are tasks at most. Tasks wait for each other, so
// that the driver can't take all of them, and more workers wake up than there is work for.
TEST(ExecutorTest, FewTasksAreGivenToWorkersOfLowNumbers) {
  constexpr int kThreads = 8;
  constexpr std::int64_t kTasks = 2;
  Executor executor(Executor::Options{kThreads, 20, nullptr});
  int highest = 0;
  executor.Run([&] {
    for (int repeat = 0; repeat < 3000; ++repeat) {
      std::atomic<int> started{0};
      std::atomic<int> seen{0};
      executor.ParallelFor(kTasks, [&](std::int64_t, int worker) {
        ++started;
        while (started < kTasks) std::this_thread::yield();
        int before = seen;
        while (before < worker && !seen.compare_exchange_weak(before, worker)) {
        }
      });
      highest = std::max(highest, seen.load());
    }
  });
  EXPECT_EQ(highest, kTasks - 1);
}

TEST(ExecutorTest, CallsTheHookOnTheDriverFirst) {
  std::atomic<int> threads{0};
  Executor executor(Executor::Options{3, 0, [&](int count) { threads = count; }});
  executor.Run([&] { EXPECT_EQ(threads, 3); });
}

}  // namespace
}  // namespace attn
