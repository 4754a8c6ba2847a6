#include "core/implementations/sparse_attention.h"

#include "core/implementations/tiled_attention.h"

namespace attn {
namespace {

using kernels::AttentionArgs;
using kernels::cpu::FlashCounters;
using kernels::cpu::FlashOptions;
using kernels::cpu::FlashSparsity;

FlashSparsity SparsityOf(const SparsityOptions& options) {
  if (options.factor) return {*options.factor, 0.0};
  return {0.0, options.mass.value_or(kDefaultMass)};
}

bool LeavesNothingOut(const FlashSparsity& sparsity) {
  return sparsity.mass > 0.0 ? sparsity.mass >= 1.0 : sparsity.factor <= 0.0;
}

class SparseAttention final : public AttentionImplementation {
 public:
  absl::Status Attend(const AttentionArgs& args, const AttentionShape&,
                      ExecutionContext& context) const override {
    const FlashSparsity sparsity = SparsityOf(context.sparsity);
    FlashOptions options = {context.device.executor().threads()};
    if (!LeavesNothingOut(sparsity)) options.sparsity = &sparsity;
    FlashCounters counters;
    const absl::Status status = RunTiledAttention(args, options, context, counters);
    SparsityReport& report = context.sparsity_report.emplace();
    if (counters.visible_pairs > 0) {
      report.sparsity = 1.0 - static_cast<double>(counters.kept_pairs) /
                                  static_cast<double>(counters.visible_pairs);
    }
    if (counters.audited_rows > 0) {
      report.recovered_mass = counters.audited_mass / static_cast<double>(counters.audited_rows);
    }
    return status;
  }

  MemoryUsage WorkspaceBytes(const AttentionShape& shape, int workers) const override {
    const FlashSparsity sparsity = SparsityOf(shape.sparsity);
    FlashOptions options = {workers};
    if (!LeavesNothingOut(sparsity)) options.sparsity = &sparsity;
    return {TiledAttentionBytes(ShapeProblem(shape).args(), options), true};
  }

  ComputeComplexity Complexity(const AttentionShape& shape) const override {
    ComputeComplexity work = TiledAttentionComplexity(shape);
    const double kept = 1.0 - SparsityOf(shape.sparsity).factor;
    work.flops = static_cast<std::uint64_t>(static_cast<double>(work.flops) * kept);
    return work;
  }
};

absl::Status Supports(const AttentionShape& shape) { return SupportsTiles(shape, "sparse"); }

}  // namespace

ImplementationRow SparseAttentionRow() {
  Traits traits;
  traits.backends = {"cpu"};
  traits.dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  traits.exact = false;
  traits.batch_invariant = true;
  traits.memory = "O(n)";
  traits.compute = "O(n^2 d)";
  traits.description =
      "flash over the pages of keys that matter; approximate; reports the attention that it kept";
  return {"sparse", std::move(traits), &Supports,
          [] { return std::unique_ptr<AttentionImplementation>(new SparseAttention); }};
}

}  // namespace attn
