#include "core/implementations/flash_attention.h"

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "kernels/cpu/flash_attention.h"

namespace attn {
namespace {

using kernels::AttentionArgs;
using kernels::cpu::FlashCounters;
using kernels::cpu::FlashOptions;
using kernels::cpu::FlashPlan;
using kernels::cpu::FlashTask;

constexpr std::size_t kAlignment = 64;

std::size_t RoundUp(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

std::size_t Workers(const FlashPlan& plan, int threads) {
  return static_cast<std::size_t>(
      std::min<std::int64_t>(threads, std::max<std::int64_t>(plan.attend_tasks, 1)));
}

// What one worker has; alone on its cache lines.
struct alignas(64) WorkerCounters {
  FlashCounters counters;
};

class FlashAttention final : public AttentionImplementation {
 public:
  absl::Status Attend(const AttentionArgs& args, const AttentionShape&,
                      ExecutionContext& context) const override {
    Executor& executor = context.device.executor();
    const FlashOptions options = {executor.threads()};
    FlashPlan plan = kernels::cpu::PlanFlashAttention(args, options, nullptr);
    std::vector<FlashTask> tasks(static_cast<std::size_t>(plan.attend_tasks + plan.merge_tasks));
    plan = kernels::cpu::PlanFlashAttention(args, options, tasks.data());
    std::sort(tasks.begin(), tasks.begin() + plan.attend_tasks,
              [](const FlashTask& a, const FlashTask& b) { return a.cost > b.cost; });

    const std::size_t workers = Workers(plan, executor.threads());
    const std::size_t scratch_bytes = RoundUp(plan.task_bytes);
    ATTN_ASSIGN_OR_RETURN(void* const scratch, context.workspace.Take(scratch_bytes * workers));
    ATTN_ASSIGN_OR_RETURN(void* const partials, context.workspace.Take(plan.partial_bytes));
    std::vector<WorkerCounters> counters(workers);
    executor.ParallelFor(plan.attend_tasks, [&](std::int64_t index, int worker) {
      if (context.IsCancelled()) return;
      const auto w = static_cast<std::size_t>(worker);
      kernels::cpu::RunFlashTask(args, plan, tasks[static_cast<std::size_t>(index)],
                                 static_cast<char*>(scratch) + scratch_bytes * w,
                                 static_cast<float*>(partials), context.cancelled,
                                 &counters[w].counters);
    });
    executor.ParallelFor(plan.merge_tasks, [&](std::int64_t index, int) {
      if (context.IsCancelled()) return;
      kernels::cpu::MergeFlashTask(args, tasks[static_cast<std::size_t>(plan.attend_tasks + index)],
                                   static_cast<float*>(partials));
    });
    for (const WorkerCounters& worker : counters) {
      context.flops += 2 * static_cast<std::uint64_t>(
                               worker.counters.score_pairs * args.head_dim +
                               worker.counters.value_pairs * args.value_dim);
    }
    return absl::OkStatus();
  }

  MemoryUsage WorkspaceBytes(const AttentionShape& shape, int workers) const override {
    const ShapeProblem problem(shape);
    const FlashPlan plan =
        kernels::cpu::PlanFlashAttention(problem.args(), FlashOptions{workers}, nullptr);
    return {RoundUp(plan.task_bytes) * Workers(plan, workers) + plan.partial_bytes, true};
  }
};

absl::Status Supports(const AttentionShape& shape) {
  if (shape.stage != kernels::ScoreStage::kNone) {
    return Unsupported("flash does not form the attention weights");
  }
  return absl::OkStatus();
}

}  // namespace

ImplementationRow FlashAttentionRow() {
  Traits traits;
  traits.backends = {"cpu"};
  traits.dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  traits.exact = true;
  traits.batch_invariant = true;
  traits.memory = "O(n)";
  traits.compute = "O(n^2 d)";
  traits.description =
      "Tiles with an online softmax; caches' pages read in place; every option but weights";
  return {"flash", std::move(traits), &Supports,
          [] { return std::unique_ptr<AttentionImplementation>(new FlashAttention); }};
}

}  // namespace attn
