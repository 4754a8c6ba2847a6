#include "core/implementations/standard_attention.h"

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "core/implementations/plain_rows.h"
#include "kernels/cpu/standard_attention.h"

namespace attn {
namespace {

class StandardAttention final : public AttentionImplementation {
 public:
  absl::Status Attend(const kernels::AttentionArgs& given, const AttentionShape& given_shape,
                      ExecutionContext& context) const override {
    ATTN_ASSIGN_OR_RETURN(const PlainRows rows, PlainRows::Create(given, given_shape, context));
    const kernels::AttentionArgs& args = rows.args();
    const kernels::TaskPlan plan = kernels::cpu::PlanStandardAttention(args);
    Executor& executor = context.device.executor();
    const auto workers = static_cast<std::size_t>(
        std::min<std::int64_t>(executor.threads(), std::max<std::int64_t>(plan.num_tasks, 1)));
    const std::size_t task_bytes = RoundUpToLine(plan.task_workspace_bytes);
    ATTN_ASSIGN_OR_RETURN(void* const workspace, context.workspace.Take(task_bytes * workers));
    executor.ParallelFor(plan.num_tasks, [&](std::int64_t task, int worker) {
      if (context.IsCancelled()) return;  // tasks without queries do not look by themselves
      kernels::cpu::RunStandardAttention(
          args, task, static_cast<char*>(workspace) + task_bytes * static_cast<std::size_t>(worker),
          context.cancelled);
    });
    context.flops += FlopsOf(args);
    return absl::OkStatus();
  }

  MemoryUsage WorkspaceBytes(const AttentionShape& shape, int workers) const override {
    const std::size_t bytes = kernels::cpu::StandardAttentionTaskBytes(
        shape.q_len, shape.longest_pairs, shape.head_dim, shape.value_dim);
    const auto tasks = std::max<std::int64_t>(shape.batch * shape.num_heads, 1);
    return {PlainRows::WorkspaceBytes(shape) +
                RoundUpToLine(bytes) *
                    static_cast<std::uint64_t>(std::min<std::int64_t>(workers, tasks)),
            true};
  }

  ComputeComplexity Complexity(const AttentionShape& shape) const override {
    const ShapeProblem problem(shape);
    kernels::AttentionArgs args = problem.args();
    // Without the keys that plain rows leave out.
    std::vector<kernels::Sequence> rows(args.sequences, args.sequences + args.num_sequences);
    for (kernels::Sequence& row : rows) {
      const std::int64_t trimmed = TrimmedKeys(args, row);
      row.kv_len -= trimmed;
      row.first_query_position -= trimmed;
    }
    args.sequences = rows.data();
    return {FlopsOf(args), "O(n^2 d)"};
  }

 private:
  static std::uint64_t FlopsOf(const kernels::AttentionArgs& args) {
    const kernels::cpu::StandardPairs pairs = kernels::cpu::CountStandardPairs(args);
    return 2 * static_cast<std::uint64_t>(args.num_heads) *
           static_cast<std::uint64_t>(pairs.scored * args.head_dim +
                                      pairs.weighed * args.value_dim);
  }
};

absl::Status Supports(const AttentionShape&) { return absl::OkStatus(); }

}  // namespace

ImplementationRow StandardAttentionRow() {
  Traits traits;
  traits.backends = {"cpu"};
  traits.dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  traits.exact = true;
  traits.outputs_attentions = true;
  traits.memory = "O(n^2)";
  traits.compute = "O(n^2 d)";
  traits.description =
      "Forms each head's score matrix; every option, weights at every stage, float32 accumulation";
  return {"standard", std::move(traits), &Supports,
          [] { return std::unique_ptr<AttentionImplementation>(new StandardAttention); }};
}

}  // namespace attn
