#include "core/implementations/tiled_attention.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

using kernels::AttentionArgs;
using kernels::cpu::FlashCounters;
using kernels::cpu::FlashOptions;
using kernels::cpu::FlashPlan;
using kernels::cpu::FlashSummaryTask;
using kernels::cpu::FlashTask;

// That have a task at the same time.
std::size_t Workers(const FlashPlan& plan, std::int64_t threads) {
  const std::int64_t tasks = std::max({plan.attend_tasks, plan.summary_tasks, std::int64_t{1}});
  return static_cast<std::size_t>(std::min(threads, tasks));
}

// What one worker did; alone on its cache lines.
struct alignas(64) WorkerCounters {
  FlashCounters counters;
};

void Add(const FlashCounters& more, FlashCounters& sum) {
  sum.score_pairs += more.score_pairs;
  sum.value_pairs += more.value_pairs;
  sum.visible_pairs += more.visible_pairs;
  sum.kept_pairs += more.kept_pairs;
  sum.audited_rows += more.audited_rows;
  sum.audited_mass += more.audited_mass;
}

// The memory of an execution, divided.
struct Scratch {
  char* tasks = nullptr;
  std::size_t task_bytes = 0;
  float* partials = nullptr;

  void* Of(int worker) const { return tasks + task_bytes * static_cast<std::size_t>(worker); }
};

void Summarize(const AttentionArgs& args, const FlashPlan& plan, const Scratch& scratch,
               ExecutionContext& context) {
  std::vector<FlashSummaryTask> tasks(static_cast<std::size_t>(plan.summary_tasks));
  kernels::cpu::PlanFlashSummaries(args, tasks.data());
  context.device.executor().ParallelFor(plan.summary_tasks, [&](std::int64_t i, int worker) {
    if (context.IsCancelled()) return;
    kernels::cpu::RunFlashSummaryTask(args, plan, tasks[static_cast<std::size_t>(i)],
                                      scratch.Of(worker));
  });
}

}  // namespace

absl::Status RunTiledAttention(const AttentionArgs& args, const FlashOptions& options,
                               ExecutionContext& context, FlashCounters& counters) {
  FlashPlan plan = kernels::cpu::PlanFlashAttention(args, options, nullptr);
  std::vector<FlashTask> tasks(static_cast<std::size_t>(plan.attend_tasks + plan.merge_tasks));
  plan = kernels::cpu::PlanFlashAttention(args, options, tasks.data());
  std::sort(tasks.begin(), tasks.begin() + plan.attend_tasks,
            [](const FlashTask& a, const FlashTask& b) { return a.cost > b.cost; });

  const std::size_t workers = Workers(plan, options.workers);
  Scratch scratch;
  scratch.task_bytes = RoundUpToLine(plan.task_bytes);
  ATTN_ASSIGN_OR_RETURN(void* const task_memory,
                        context.workspace.Take(scratch.task_bytes * workers));
  scratch.tasks = static_cast<char*>(task_memory);
  ATTN_ASSIGN_OR_RETURN(void* const partials, context.workspace.Take(plan.partial_bytes));
  scratch.partials = static_cast<float*>(partials);
  ATTN_ASSIGN_OR_RETURN(void* const summaries, context.workspace.Take(plan.summary_bytes));
  plan.summaries = static_cast<float*>(summaries);

  if (plan.summary_tasks > 0) Summarize(args, plan, scratch, context);
  std::vector<WorkerCounters> worked(workers);
  Executor& executor = context.device.executor();
  executor.ParallelFor(plan.attend_tasks, [&](std::int64_t i, int worker) {
    if (context.IsCancelled()) return;
    kernels::cpu::RunFlashTask(args, plan, tasks[static_cast<std::size_t>(i)], scratch.Of(worker),
                               scratch.partials, context.cancelled,
                               &worked[static_cast<std::size_t>(worker)].counters);
  });
  executor.ParallelFor(plan.merge_tasks, [&](std::int64_t i, int) {
    if (context.IsCancelled()) return;
    kernels::cpu::MergeFlashTask(args, tasks[static_cast<std::size_t>(plan.attend_tasks + i)],
                                 scratch.partials);
  });
  for (const WorkerCounters& worker : worked) Add(worker.counters, counters);
  context.flops += 2 * static_cast<std::uint64_t>(counters.score_pairs * args.head_dim +
                                                  counters.value_pairs * args.value_dim);
  return absl::OkStatus();
}

std::uint64_t TiledAttentionBytes(const AttentionArgs& args, const FlashOptions& options) {
  const FlashPlan plan = kernels::cpu::PlanFlashAttention(args, options, nullptr);
  return RoundUpToLine(plan.task_bytes) * Workers(plan, options.workers) + plan.partial_bytes +
         plan.summary_bytes;
}

ComputeComplexity TiledAttentionComplexity(const AttentionShape& shape) {
  const FlashCounters pairs = kernels::cpu::CountFlashPairs(ShapeProblem(shape).args());
  return {2 * static_cast<std::uint64_t>(pairs.score_pairs * shape.head_dim +
                                         pairs.value_pairs * shape.value_dim),
          "O(n^2 d)"};
}

absl::Status SupportsTiles(const AttentionShape& shape, const char* name) {
  if (shape.stage != kernels::ScoreStage::kNone) {
    return Unsupported(absl::StrCat(name, " does not form the attention weights"));
  }
  return absl::OkStatus();
}

}  // namespace attn
