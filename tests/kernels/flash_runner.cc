#include "tests/kernels/flash_runner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "tests/reference/attention_reference.h"

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::Sequence;
using kernels::cpu::FlashOptions;
using kernels::cpu::FlashPlan;
using kernels::cpu::FlashTask;
using kernels::cpu::IsaKernels;

constexpr std::size_t kGuard = 256;
constexpr uint8_t kPoison = 0xff;  // NaN in every element type

class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t bytes)
      : bytes_(bytes),
        size_((bytes + 63) / 64 * 64 + kGuard),
        memory_(static_cast<uint8_t*>(std::aligned_alloc(64, size_)), &std::free) {
    Poison();
  }
  void Poison() { std::fill_n(memory_.get(), size_, kPoison); }
  void* data() { return memory_.get(); }
  bool GuardIsWhole() const {
    return std::all_of(memory_.get() + bytes_, memory_.get() + size_,
                       [](uint8_t byte) { return byte == kPoison; });
  }

 private:
  std::size_t bytes_;
  std::size_t size_;
  std::unique_ptr<uint8_t, decltype(&std::free)> memory_;
};

// In everything that a kernel is given.
bool IsSamePlan(const FlashTasks& a, const FlashTasks& b) {
  const auto same_task = [](const FlashTask& x, const FlashTask& y) {
    return x.sequence == y.sequence && x.kv_head == y.kv_head && x.first_row == y.first_row &&
           x.num_rows == y.num_rows && x.first_segment == y.first_segment &&
           x.end_segment == y.end_segment && x.partial == y.partial;
  };
  return a.plan.tight == b.plan.tight && a.plan.max_rows == b.plan.max_rows &&
         a.plan.merges_inside == b.plan.merges_inside &&
         std::equal(a.tasks.begin(), a.tasks.end(), b.tasks.begin(), b.tasks.end(), same_task);
}

ResultRange Whole(const AttentionArgs& args, int64_t sequence) {
  return {sequence, 0, args.sequences[sequence].q_len, 0, args.num_heads};
}

template <typename Visit>
void VisitResults(const AttentionArgs& args, const ResultRange& range, Visit visit) {
  const Sequence& sequence = args.sequences[range.sequence];
  const int64_t bytes = ElementBytes(args.output_dtype);
  for (int64_t row = range.first; row < range.first + range.count; ++row) {
    for (int64_t head = range.first_head; head < range.end_head; ++head) {
      visit(static_cast<char*>(sequence.output.data) +
                (row * sequence.output.row_stride + head * sequence.output.head_stride) * bytes,
            args.value_dim * bytes);
      if (sequence.lse == nullptr) continue;
      visit(reinterpret_cast<char*>(sequence.lse + row * sequence.lse_row_stride +
                                    head * sequence.lse_head_stride),
            int64_t{4});
    }
  }
}

}  // namespace

FlashTasks PlanFlash(const AttentionArgs& args, const FlashOptions& cut) {
  FlashTasks planned;
  planned.plan = kernels::cpu::PlanFlashAttention(args, cut, nullptr);
  planned.tasks.resize(
      static_cast<std::size_t>(planned.plan.attend_tasks + planned.plan.merge_tasks));
  const FlashPlan again = kernels::cpu::PlanFlashAttention(args, cut, planned.tasks.data());
  EXPECT_EQ(again.attend_tasks, planned.plan.attend_tasks);
  EXPECT_EQ(again.merge_tasks, planned.plan.merge_tasks);
  EXPECT_EQ(again.task_bytes, planned.plan.task_bytes);
  EXPECT_EQ(again.partial_bytes, planned.plan.partial_bytes);
  return planned;
}

FlashOutcome RunFlash(const IsaKernels& isa, const AttentionArgs& args, const FlashOptions& cut) {
  const FlashTasks planned = PlanFlash(args, cut);
  FlashOutcome outcome = {planned.plan, {}};
  const auto attend = static_cast<std::size_t>(planned.plan.attend_tasks);
  GuardedMemory scratch(planned.plan.task_bytes);
  GuardedMemory partials(planned.plan.partial_bytes);
  auto* const partial = static_cast<float*>(partials.data());
  for (std::size_t i = attend; i-- > 0;) {
    scratch.Poison();
    kernels::cpu::FlashCounters counters;
    isa.flash_attention(args, planned.plan, planned.tasks[i], scratch.data(), partial, nullptr,
                        &counters);
    outcome.counters.score_pairs += counters.score_pairs;
    outcome.counters.value_pairs += counters.value_pairs;
    EXPECT_TRUE(scratch.GuardIsWhole()) << "task " << i;
  }
  for (std::size_t i = planned.tasks.size(); i-- > attend;) {
    isa.merge_flash(args, planned.tasks[i], partial);
  }
  EXPECT_TRUE(partials.GuardIsWhole());
  return outcome;
}

std::vector<FlashOptions> FlashCuts() {
  std::vector<FlashOptions> cuts;
  for (const int64_t workers : {1, 2, 64}) {
    for (const int64_t max_rows : {0, 12, 48}) {
      for (const bool tight : {false, true}) cuts.push_back({workers, max_rows, tight});
    }
  }
  return cuts;
}

std::vector<char> ResultBits(const AttentionArgs& args, const ResultRange& range) {
  std::vector<char> bits;
  VisitResults(args, range, [&](const char* data, int64_t bytes) {
    bits.insert(bits.end(), data, data + bytes);
  });
  return bits;
}

std::vector<char> ResultBits(const AttentionArgs& args) {
  std::vector<char> bits;
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    const std::vector<char> more = ResultBits(args, Whole(args, s));
    bits.insert(bits.end(), more.begin(), more.end());
  }
  return bits;
}

void PoisonResults(const AttentionArgs& args) {
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    VisitResults(args, Whole(args, s), [](char* data, int64_t bytes) {
      std::fill_n(data, bytes, static_cast<char>(kPoison));
    });
  }
}

FlashOutcome ExpectSameBitsForAllCuts(const IsaKernels& isa, const AttentionArgs& args) {
  const std::vector<FlashOptions> cuts = FlashCuts();
  PoisonResults(args);
  const FlashOutcome first = RunFlash(isa, args, cuts[0]);
  const std::vector<char> bits = ResultBits(args);
  std::vector<FlashTasks> done = {PlanFlash(args, cuts[0])};
  for (std::size_t i = 1; i < cuts.size(); ++i) {
    FlashTasks planned = PlanFlash(args, cuts[i]);
    const auto same = [&](const FlashTasks& other) { return IsSamePlan(planned, other); };
    if (std::any_of(done.begin(), done.end(), same)) continue;
    done.push_back(std::move(planned));
    PoisonResults(args);
    const FlashOutcome outcome = RunFlash(isa, args, cuts[i]);
    const bool same_counts = outcome.counters.score_pairs == first.counters.score_pairs &&
                             outcome.counters.value_pairs == first.counters.value_pairs;
    EXPECT_TRUE(same_counts) << "other counters: " << testing::PrintToString(cuts[i]);
    EXPECT_TRUE(ResultBits(args) == bits) << "other bits: " << testing::PrintToString(cuts[i]);
  }
  return first;
}

std::vector<const IsaKernels*> FlashIsas() {
  const kernels::cpu::IsaTable table = kernels::cpu::CompiledIsas();
  std::vector<const IsaKernels*> isas;
  for (int64_t i = 0; i < table.size; ++i) {
    if (table.rows[i].supported()) isas.push_back(&table.rows[i]);
  }
  return isas;
}

}  // namespace attn::reference
