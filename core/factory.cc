#include "core/factory.h"

#include "core/error.h"
#include "core/projected_attention.h"
#include "core/selector.h"

namespace attn {
namespace {

// A module together with the model whose layer it computes.
class OwningModule final : public AttentionModule {
 public:
  OwningModule(std::shared_ptr<const HostedModel> model, const HostedLayer& layer,
               std::shared_ptr<const AttentionImplementation> implementation,
               std::int64_t max_tokens)
      : model_(std::move(model)), module_(layer, std::move(implementation), max_tokens) {}

  absl::StatusOr<ForwardPlan> Plan(const ForwardInputs& inputs) const override {
    return module_.Plan(inputs);
  }
  absl::Status Forward(const ForwardInputs& inputs, const ForwardOutputs& outputs,
                       ExecutionContext& context) const override {
    return module_.Forward(inputs, outputs, context);
  }
  attn::MemoryUsage MemoryUsage(const AttentionShape& shape, int workers) const override {
    return module_.MemoryUsage(shape, workers);
  }
  attn::ComputeComplexity ComputeComplexity(const AttentionShape& shape) const override {
    return module_.ComputeComplexity(shape);
  }

 private:
  const std::shared_ptr<const HostedModel> model_;
  const ProjectedAttention module_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<AttentionModule>> CreateAttentionModule(
    const ModelSpec& spec, const LayerRef& ref, const FactoryOptions& options) {
  LoadOptions load;
  load.model_root = options.model_root;
  ATTN_ASSIGN_OR_RETURN(std::shared_ptr<const HostedModel> model, HostedModel::Create(spec, load));
  return CreateAttentionModule(std::move(model), ref, options);
}

absl::StatusOr<std::unique_ptr<AttentionModule>> CreateAttentionModule(
    std::shared_ptr<const HostedModel> model, const LayerRef& ref, const FactoryOptions& options) {
  const ModelSpec& spec = model->spec();
  ATTN_ASSIGN_OR_RETURN(const HostedLayer* const layer, model->Find(ref));
  ATTN_RETURN_IF_ERROR(RequireWeights(*layer, spec.name));
  SelectionRequest request;
  request.named = spec.implementation.empty() ? kAutoImplementation : spec.implementation;
  request.allow_approximate = spec.allow_approximate;
  ATTN_ASSIGN_OR_RETURN(const Selection selection,
                        SelectImplementation(options.table, request, PlainShape(*layer)));
  return std::unique_ptr<AttentionModule>(
      new OwningModule(model, *layer, selection.row->create(), options.max_tokens));
}

}  // namespace attn
