// What the flash kernel promises beside its results: counters by a formula, scratch memory that
// does not grow with the sequence, and an end soon after it was cancelled.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/flash_attention.h"
#include "tests/conformance/paged_problem.h"
#include "tests/kernels/flash_runner.h"
#include "tests/reference/attention_reference.h"
#include "tests/reference/problem_builder.h"

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::KeyValueSpan;
using kernels::MaskType;
using kernels::Sequence;
using kernels::cpu::FlashCounters;
using kernels::cpu::FlashOptions;
using kernels::cpu::FlashPlan;
using kernels::cpu::FlashTask;
using kernels::cpu::IsaKernels;

class FlashLimitsTest : public testing::TestWithParam<const IsaKernels*> {};

INSTANTIATE_TEST_SUITE_P(Isa, FlashLimitsTest, testing::ValuesIn(FlashIsas()),
                         [](const auto& test) { return std::string(test.param->name); });

// How an instruction set cuts a tile.
struct Blocks {
  int64_t rows;         // of a block
  int64_t keys;         // that a full block takes at once
  int64_t partly_full;  // and a block of fewer rows
};
Blocks BlocksOf(const IsaKernels& isa) {
  const std::string name = isa.name;
  if (name == "scalar") return {4, 8, 16};
  if (name == "avx2") return {6, 16, 16};
  return {6, 64, 16};  // vectors of 16 lanes
}

// Tokens that are multiplied together.
int64_t Depth(const IsaKernels& isa, const AttentionArgs& args) {
  if (kernels::cpu::FlashWeightType(isa, args) == ElementType::kBFloat16) return 2;
  if (!args.paged) return 1;
  if (args.kv_dtype == ElementType::kInt8) return 4;
  return args.kv_dtype == ElementType::kBFloat16 ? 2 : 1;
}

// Rows of a KV head, query heads side by side, come in blocks. A block meets the keys from the
// first to the last one that any of its rows sees by position, in whole panels for the scores and
// in whole groups for the values.
FlashCounters Expected(const IsaKernels& isa, const AttentionArgs& args) {
  const Blocks blocks = BlocksOf(isa);
  const int64_t depth = Depth(isa, args);
  const int64_t group = args.num_heads / args.num_kv_heads;
  AttentionArgs unmasked = args;
  unmasked.mask.data = nullptr;
  if (args.mask.type != MaskType::kNone) unmasked.mask = {};
  FlashCounters counters;
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    const Sequence& sequence = args.sequences[s];
    for (int64_t first = 0; first < sequence.q_len * group; first += blocks.rows) {
      const int64_t rows = std::min(blocks.rows, sequence.q_len * group - first);
      int64_t begin = sequence.kv_len;
      int64_t end = 0;
      for (int64_t row = first; row < first + rows; ++row) {
        for (int64_t key = 0; key < sequence.kv_len; ++key) {
          const bool covered = args.mask.type == MaskType::kNone || key < args.mask.kv_extent;
          if (!covered || !Sees(unmasked, sequence, 0, row / group, key)) continue;
          begin = std::min(begin, key);
          end = std::max(end, key + 1);
        }
      }
      if (begin >= end) continue;
      const auto whole = [&](int64_t unit) {
        return rows * ((end + unit - 1) / unit - begin / unit) * unit * args.num_kv_heads;
      };
      counters.score_pairs += whole(rows == blocks.rows ? blocks.keys : blocks.partly_full);
      counters.value_pairs += whole(depth);
    }
  }
  return counters;
}

void ExpectCounters(const IsaKernels& isa, const AttentionArgs& args) {
  const FlashCounters expected = Expected(isa, args);
  const FlashCounters counted = ExpectSameBitsForAllCuts(isa, args).counters;
  EXPECT_EQ(counted.score_pairs, expected.score_pairs);
  EXPECT_EQ(counted.value_pairs, expected.value_pairs);
}

TEST_P(FlashLimitsTest, CountersFollowAFormula) {
  for (const int64_t window : {-1, 0, 50, 333}) {
    for (const int64_t kv_heads : {1, 2, 4}) {
      for (const bool ragged : {false, true}) {
        ProblemCase c;
        c.batch = ragged ? 4 : 1;
        c.ragged = ragged;
        c.heads = 4;
        c.kv_heads = kv_heads;
        c.q_len = 70;
        c.kv_len = 331;
        c.head_dim = c.value_dim = 4;
        c.causal = window != 50;
        c.window_left = window;
        c.window_right = window == 50 ? 9 : -1;
        SCOPED_TRACE(CaseName(c));
        AttentionProblem problem(c);
        ExpectCounters(*GetParam(), problem.args());
        for (const ElementType cache : {ElementType::kBFloat16, ElementType::kInt8}) {
          const PagedProblem paged(c, cache, window >= 0);
          ExpectCounters(*GetParam(), paged.args());
        }
      }
    }
  }
}

// Keys that a mask hides are computed; those beyond its extent are not. What hidden keys hold
// changes no count.
TEST_P(FlashLimitsTest, CountersUnderMasksAndBesideNaN) {
  for (const bool nan : {false, true}) {
    for (const int64_t q_len : {2, 40}) {
      ProblemCase c;
      c.heads = 2;
      c.q_len = q_len;
      c.kv_len = 300;
      c.mask = MaskType::kFloat32;
      c.mask_rank = 1;
      c.mask_extent = 270;
      c.causal = true;
      c.hidden_keys_nan = nan;
      AttentionProblem problem(c);
      SCOPED_TRACE(CaseName(c));
      ExpectCounters(*GetParam(), problem.args());
    }
  }
}

// A problem without tensors: b, heads, kv_heads, q_len, kv_len, head_dim.
struct Shape {
  explicit Shape(const std::vector<int64_t>& n, bool causal)
      : sequences(static_cast<std::size_t>(n[0])) {
    args.dtype = args.kv_dtype = args.output_dtype = ElementType::kBFloat16;
    args.num_heads = n[1];
    args.num_kv_heads = n[2];
    args.head_dim = args.value_dim = n[5];
    args.is_causal = causal;
    for (Sequence& sequence : sequences) {
      sequence.q_len = n[3];
      sequence.kv_len = n[4];
      sequence.first_query_position = n[4] - n[3];
    }
    args.sequences = sequences.data();
    args.num_sequences = n[0];
  }
  std::vector<Sequence> sequences;
  AttentionArgs args;
};

int64_t BytesPerWorker(const Shape& shape, int64_t workers) {
  const FlashPlan plan = kernels::cpu::PlanFlashAttention(shape.args, {workers}, nullptr);
  return static_cast<int64_t>(plan.task_bytes) + static_cast<int64_t>(plan.partial_bytes) / workers;
}

TEST(FlashMemory, ScratchIsSmallAndDoesNotGrowWithTheSequence) {
  constexpr int64_t kMost = 2 << 20;
  for (const bool paged : {false, true}) {
    for (const int64_t workers : {1, 2, 8}) {
      std::vector<int64_t> prefill;
      for (const int64_t n : {1024, 8192, 32768, 65536}) {
        Shape shape({1, 8, 8, n, n, 128}, true);
        shape.args.paged = paged;
        const int64_t bytes = BytesPerWorker(shape, workers);
        EXPECT_LE(bytes, kMost) << n;
        prefill.push_back(bytes);
        Shape decode({1, 32, 8, 1, n, 128}, false);
        decode.args.paged = paged;
        EXPECT_LE(BytesPerWorker(decode, workers), kMost) << n;
      }
      // Rows come in even shares of the most that a task takes.
      for (const int64_t bytes : prefill) EXPECT_LE(bytes, prefill[1] * 11 / 10);
    }
  }
}

// Of a task alone: the results that wait for their merge are a row of floats for each 2,048 keys.
TEST(FlashMemory, TaskOfADecodeStepDoesNotGrowWithTheSequence) {
  for (const int64_t n : {8192, 65536, 1 << 20}) {
    const Shape shape({1, 32, 8, 1, n, 128}, false);
    const FlashPlan plan = kernels::cpu::PlanFlashAttention(shape.args, {2}, nullptr);
    const Shape small({1, 32, 8, 1, 8192, 128}, false);
    const FlashPlan other = kernels::cpu::PlanFlashAttention(small.args, {2}, nullptr);
    EXPECT_EQ(plan.task_bytes, other.task_bytes);
    EXPECT_EQ(plan.partial_bytes, static_cast<std::size_t>(n / 2048 * 32 * (128 + 16) * 4));
  }
}

// A long problem of one head whose keys and values are few rows again and again.
struct LongProblem {
  explicit LongProblem(bool masked) : rows(4096 * kDim), output(4096 * kDim), mask(kKeys, 1) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      rows[i] = static_cast<float>(static_cast<int>(i * 2654435761u >> 16 & 255) - 128) / 128;
    }
    span.length = sequence.kv_len = kKeys;
    span.key = span.value = {rows.data(), 0, 0};
    sequence.q_len = 4096;
    sequence.first_query_position = kKeys - 4096;
    sequence.query = {rows.data(), kDim, 0};
    sequence.output = {output.data(), kDim, 0};
    sequence.spans = &span;
    sequence.num_spans = 1;
    args.num_heads = args.num_kv_heads = 1;
    args.head_dim = args.value_dim = kDim;
    args.scale = 0.1f;
    if (masked) {
      // A value that is not finite beside a mask: kernels look at each weight.
      rows[0] = std::numeric_limits<float>::infinity();
      args.mask = {MaskType::kBool, mask.data(), 0, 0, 0, 1, kKeys};
    }
    args.sequences = &sequence;
    args.num_sequences = 1;
  }
  static constexpr int64_t kDim = 128;
  static constexpr int64_t kKeys = 65536;
  std::vector<float> rows;
  std::vector<float> output;
  std::vector<uint8_t> mask;
  KeyValueSpan span;
  Sequence sequence;
  AttentionArgs args;
};

using Clock = std::chrono::steady_clock;
double Milliseconds(Clock::duration time) {
  return std::chrono::duration<double, std::milli>(time).count();
}

// From the moment at which the running task is cancelled to its return.
double CancelLatency(const IsaKernels& isa, const AttentionArgs& args, const FlashOptions& cut,
                     std::chrono::microseconds after) {
  const FlashTasks planned = PlanFlash(args, cut);
  const std::size_t bytes = (planned.plan.task_bytes + 63) / 64 * 64;
  const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes),
                                                            &std::free);
  std::vector<float> partials(planned.plan.partial_bytes / 4);
  bool cancelled = false;
  std::atomic<Clock::rep> cancelled_at{0};
  const Clock::time_point start = Clock::now();
  std::thread canceller([&] {
    std::this_thread::sleep_until(start + after);
    cancelled_at = Clock::now().time_since_epoch().count();
    __atomic_store_n(&cancelled, true, __ATOMIC_RELAXED);
  });
  FlashCounters counters;
  isa.flash_attention(args, planned.plan, planned.tasks[0], scratch.get(), partials.data(),
                      &cancelled, &counters);
  const Clock::time_point end = Clock::now();
  canceller.join();
  const Clock::time_point from{Clock::duration(cancelled_at.load())};
  EXPECT_LT(from, end) << "the task ended by itself";
  return Milliseconds(end - from);
}

double MedianCancelLatency(const IsaKernels& isa, const AttentionArgs& args,
                           const FlashOptions& cut) {
  std::vector<double> latencies;
  for (int i = 0; i < 9; ++i) {
    // In the middle of whatever a task does at that time.
    latencies.push_back(CancelLatency(isa, args, cut, std::chrono::microseconds(1500 + 3700 * i)));
  }
  std::sort(latencies.begin(), latencies.end());
  return latencies[latencies.size() / 2];
}

// 5 ms are promised; sanitizers, and instruction sets that this machine only emulates, are slower.
double MostMilliseconds(const IsaKernels& isa) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr double kMost = 20;
#else
  constexpr double kMost = 5;
#endif
  const bool emulated =
      std::string(isa.name).rfind("avx512", 0) == 0 && !__builtin_cpu_supports("avx512f");
  return emulated ? 50 * kMost : kMost;
}

TEST_P(FlashLimitsTest, CancelledTaskEndsWithinMilliseconds) {
  for (const bool masked : {false, true}) {
    LongProblem problem(masked);
    for (const FlashOptions& cut :
         {FlashOptions{1}, FlashOptions{1, 4096}, FlashOptions{1, 0, true}}) {
      EXPECT_LT(MedianCancelLatency(*GetParam(), problem.args, cut), MostMilliseconds(*GetParam()))
          << testing::PrintToString(cut) << (masked ? ", masked" : "");
    }
  }
}

TEST_P(FlashLimitsTest, CancelledTaskLeavesTheRowsOfOthersAlone) {
  ProblemCase c;
  c.heads = c.kv_heads = 8;
  c.q_len = 24;
  c.kv_len = 2500;
  c.lse = true;
  AttentionProblem problem(c);
  const AttentionArgs& args = problem.args();
  const FlashOptions cut = {1, 12, false};
  RunFlash(*GetParam(), args, cut);
  const FlashTasks planned = PlanFlash(args, cut);
  ASSERT_EQ(planned.plan.merge_tasks, 0);
  const auto bits_of = [&](const FlashTask& task) {
    return ResultBits(args,
                      {0, task.first_row, task.num_rows, task.kv_head, task.kv_head + int64_t{1}});
  };
  std::vector<std::vector<char>> bits;
  for (const FlashTask& task : planned.tasks) bits.push_back(bits_of(task));
  PoisonResults(args);
  const std::vector<char> poison = bits_of(planned.tasks[0]);
  const std::unique_ptr<void, decltype(&std::free)> scratch(
      std::aligned_alloc(64, (planned.plan.task_bytes + 63) / 64 * 64), &std::free);
  for (std::size_t i = 0; i < planned.tasks.size(); ++i) {
    const bool cancelled = i % 3 == 0;
    FlashCounters counters;
    GetParam()->flash_attention(args, planned.plan, planned.tasks[i], scratch.get(), nullptr,
                                &cancelled, &counters);
  }
  for (std::size_t i = 0; i < planned.tasks.size(); ++i) {
    EXPECT_TRUE(bits_of(planned.tasks[i]) == (i % 3 == 0 ? poison : bits[i])) << i;
  }
  EXPECT_TRUE(problem.NothingElseWritten());
}

}  // namespace
}  // namespace attn::reference
