#include "core/implementations/flash_attention.h"

#include "core/implementations/tiled_attention.h"

namespace attn {
namespace {

class FlashAttention final : public AttentionImplementation {
 public:
  absl::Status Attend(const kernels::AttentionArgs& args, const AttentionShape&,
                      ExecutionContext& context) const override {
    kernels::cpu::FlashCounters counters;
    return RunTiledAttention(args, {context.device.executor().threads()}, context, counters);
  }

  MemoryUsage WorkspaceBytes(const AttentionShape& shape, int workers) const override {
    return {TiledAttentionBytes(ShapeProblem(shape).args(), {workers}), true};
  }

  ComputeComplexity Complexity(const AttentionShape& shape) const override {
    return TiledAttentionComplexity(shape);
  }
};

absl::Status Supports(const AttentionShape& shape) { return SupportsTiles(shape, "flash"); }

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
