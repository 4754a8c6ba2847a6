#include "core/implementations/memory_efficient_attention.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/implementations/tiled_attention.h"

namespace attn {
namespace {

using kernels::AttentionArgs;
using kernels::cpu::FlashOptions;

constexpr std::int64_t kFewestRows = 12;  // of a tile: whole register blocks
constexpr std::int64_t kMostRows = 768;

FlashOptions Cut(std::int64_t workers, std::int64_t rows) {
  FlashOptions options;
  options.workers = workers;
  options.max_rows = rows;
  options.tight = true;
  return options;
}

// The most rows for each of the most workers that the budget holds: rows first, down to one tile
// each, then workers. Fewest of both where it holds nothing.
FlashOptions CutFor(const AttentionArgs& args, std::uint64_t budget, std::int64_t workers) {
  for (; workers > 1; --workers) {
    if (TiledAttentionBytes(args, Cut(workers, kFewestRows)) <= budget) break;
  }
  std::int64_t rows = kFewestRows;
  while (rows < kMostRows && TiledAttentionBytes(args, Cut(workers, 2 * rows)) <= budget) {
    rows *= 2;
  }
  return Cut(workers, rows);
}

class MemoryEfficientAttention final : public AttentionImplementation {
 public:
  absl::Status Attend(const AttentionArgs& args, const AttentionShape&,
                      ExecutionContext& context) const override {
    const FlashOptions options =
        CutFor(args, context.memory_budget, context.device.executor().threads());
    const std::uint64_t bytes = TiledAttentionBytes(args, options);
    if (bytes > context.memory_budget) {
      return MakeError(absl::StatusCode::kResourceExhausted, "MEMORY_EFFICIENT_BUDGET",
                       absl::StrCat("memory_efficient needs ", bytes,
                                    " bytes of scratch memory for one tile, but its budget is ",
                                    context.memory_budget));
    }
    kernels::cpu::FlashCounters counters;
    return RunTiledAttention(args, options, context, counters);
  }

  MemoryUsage WorkspaceBytes(const AttentionShape& shape, int workers) const override {
    const ShapeProblem problem(shape);
    return {
        TiledAttentionBytes(problem.args(), CutFor(problem.args(), kDefaultMemoryBudget, workers)),
        true};
  }

  ComputeComplexity Complexity(const AttentionShape& shape) const override {
    return TiledAttentionComplexity(shape);
  }
};

absl::Status Supports(const AttentionShape& shape) {
  return SupportsTiles(shape, "memory_efficient");
}

}  // namespace

ImplementationRow MemoryEfficientAttentionRow() {
  Traits traits;
  traits.backends = {"cpu"};
  traits.dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  traits.exact = true;
  traits.batch_invariant = true;
  traits.memory = "O(1)";
  traits.compute = "O(n^2 d)";
  traits.description = "flash within a budget of scratch memory, whatever the sequence's length";
  return {"memory_efficient", std::move(traits), &Supports,
          [] { return std::unique_ptr<AttentionImplementation>(new MemoryEfficientAttention); }};
}

}  // namespace attn
