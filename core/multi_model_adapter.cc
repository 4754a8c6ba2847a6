#include "core/multi_model_adapter.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/hardware.h"
#include "core/projected_attention.h"

namespace attn {
namespace {

// Scratch memory that stays allocated between executions.
constexpr std::size_t kKeptWorkspaceBytes = std::size_t{256} << 20;

// What follows from the modality where nothing else is said; unset: nothing does.
std::optional<bool> CausalByModality(Modality modality) {
  switch (modality) {
    case Modality::kLanguage:
      return true;
    case Modality::kVision:
      return false;
    case Modality::kMultimodal:
    case Modality::kUnspecified:
      break;
  }
  return std::nullopt;
}

void FillCausal(std::vector<LayerSpec>& layers, std::optional<bool> causal) {
  for (LayerSpec& layer : layers) {
    if (!layer.options.is_causal) layer.options.is_causal = causal;
  }
}

// A layer without a past sees all of its keys in each call.
absl::Status RefusePast(const ForwardInputs& inputs) {
  const char* field = nullptr;
  if (inputs.past_key.defined()) field = "past_key";
  if (inputs.past_value.defined()) field = "past_value";
  if (inputs.use_cache) field = "use_cache";
  if (inputs.cache != nullptr) field = "sessions";
  if (field == nullptr) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(field,
                                          " is set, but layers of vision have no past: every "
                                          "call brings all of its patches"));
}

absl::Status Allocate(Device& device, const OutputSpec& spec, AdapterTensor& tensor) {
  if (!spec.defined()) return absl::OkStatus();
  ATTN_ASSIGN_OR_RETURN(tensor.buffer, device.Allocate(spec.bytes()));
  tensor.view = MutableTensorView(tensor.buffer.data.get(), spec.dtype, spec.shape.data(),
                                  static_cast<int>(spec.shape.size()));
  return absl::OkStatus();
}

Executor::Options DeviceOptions(const AdapterConfig& config) {
  Executor::Options options;
  options.threads = config.threads > 0 ? config.threads : DescribeCpu().cores;
  return options;
}

}  // namespace

ModelSpec WithModalityDefaults(ModelSpec spec) {
  for (LayerStack& stack : spec.stacks) {
    const Modality modality =
        stack.modality == Modality::kUnspecified ? spec.modality : stack.modality;
    FillCausal(stack.self_attention, CausalByModality(modality));
    FillCausal(stack.cross_attention, false);
  }
  return spec;
}

absl::StatusOr<std::unique_ptr<MultiModelAttentionAdapter>> MultiModelAttentionAdapter::Create(
    const AdapterConfig& config, const ModelSpec& spec) {
  LoadOptions load;
  load.model_root = config.factory.model_root;
  // A directory says everything about its layers by itself.
  ATTN_ASSIGN_OR_RETURN(
      std::shared_ptr<const HostedModel> model,
      HostedModel::Create(spec.weights.empty() ? WithModalityDefaults(spec) : spec, load));
  const ImplementationRow* active = nullptr;
  if (!spec.implementation.empty() && spec.implementation != kAutoImplementation) {
    ATTN_ASSIGN_OR_RETURN(active, RequireImplementation(config.factory.table, spec.implementation));
  }
  std::unique_ptr<MultiModelAttentionAdapter> adapter(
      new MultiModelAttentionAdapter(config, std::move(model)));
  adapter->active_ = active;
  return adapter;
}

MultiModelAttentionAdapter::MultiModelAttentionAdapter(const AdapterConfig& config,
                                                       std::shared_ptr<const HostedModel> model)
    : config_(config),
      model_(std::move(model)),
      device_(CreateCpuDevice(DeviceOptions(config))),
      workspace_(*device_, config.max_workspace_bytes, kKeptWorkspaceBytes),
      manager_(*device_, workspace_, config.factory.table) {}

std::vector<LayerRef> MultiModelAttentionAdapter::Layers(Modality modality) const {
  std::vector<LayerRef> refs;
  const auto add = [&](const LayerStack& stack, const std::vector<LayerSpec>& runs,
                       AttentionKind kind) {
    LayerRef ref{spec().name, stack.name, 0, kind};
    if (ModalityOf(spec(), ref) != modality) return;
    for (const LayerSpec& run : runs) {
      for (std::uint32_t i = 0; i < run.repeat; ++i, ++ref.layer) refs.push_back(ref);
    }
  };
  for (const LayerStack& stack : spec().stacks) {
    add(stack, stack.self_attention, AttentionKind::kSelf);
    add(stack, stack.cross_attention, AttentionKind::kCross);
  }
  return refs;
}

absl::StatusOr<AdapterResult> MultiModelAttentionAdapter::Forward(const LayerRef& ref,
                                                                  const ForwardInputs& inputs) {
  return GuardMemory([&]() -> absl::StatusOr<AdapterResult> {
    ATTN_ASSIGN_OR_RETURN(const HostedLayer* const layer, model_->Find(ref));
    ATTN_RETURN_IF_ERROR(RequireWeights(*layer, spec().name));
    if (ModalityOf(spec(), ref) == Modality::kVision) ATTN_RETURN_IF_ERROR(RefusePast(inputs));
    const std::int64_t max_tokens = config_.factory.max_tokens;
    ATTN_ASSIGN_OR_RETURN(const ForwardPlan plan,
                          ProjectedAttention(*layer, nullptr, max_tokens).Plan(inputs));
    return Execute(plan.shape, plan.outputs,
                   [&](const Choice& choice, AdapterResult& result, ExecutionContext& context) {
                     const ProjectedAttention module(*layer, choice.implementation, max_tokens);
                     return module.Forward(inputs,
                                           {result.output.view, result.attention_weights.view,
                                            result.present_key.view, result.present_value.view},
                                           context);
                   });
  });
}

absl::StatusOr<AdapterResult> MultiModelAttentionAdapter::Attend(const LayerRef& ref,
                                                                 const AttendInputs& inputs) {
  return GuardMemory([&]() -> absl::StatusOr<AdapterResult> {
    ATTN_ASSIGN_OR_RETURN(const HostedLayer* const layer, model_->Find(ref));
    if (inputs.cache != nullptr) {
      return InvalidField("sessions", "sessions are set, but the adapter's Attend takes none");
    }
    ATTN_ASSIGN_OR_RETURN(
        AttentionProblem problem,
        AttentionProblem::Create(inputs, layer->spec.get(), config_.factory.max_tokens));
    return Execute(
        problem.shape(), problem.outputs(),
        [&](const Choice& choice, AdapterResult& result, ExecutionContext& context) {
          problem.Bind({result.output.view, result.attention_weights.view, result.lse.view,
                        result.present_key.view, result.present_value.view});
          return choice.implementation->Attend(problem.args(), problem.shape(), context);
        });
  });
}

absl::StatusOr<AdapterResult> MultiModelAttentionAdapter::Execute(
    AttentionShape shape, const AttentionProblem::Outputs& outputs, Body body) {
  shape.sparsity = spec().sparsity;
  SelectionRequest request;
  request.active = active_;
  request.allow_approximate = spec().allow_approximate;
  ATTN_ASSIGN_OR_RETURN(const Choice choice, manager_.SelectAttentionModule(request, shape));
  AdapterResult result;
  ATTN_RETURN_IF_ERROR(Allocate(*device_, outputs.output, result.output));
  ATTN_RETURN_IF_ERROR(Allocate(*device_, outputs.attention_weights, result.attention_weights));
  ATTN_RETURN_IF_ERROR(Allocate(*device_, outputs.lse, result.lse));
  ATTN_RETURN_IF_ERROR(Allocate(*device_, outputs.present_key, result.present_key));
  ATTN_RETURN_IF_ERROR(Allocate(*device_, outputs.present_value, result.present_value));
  absl::Status status;
  device_->executor().Run([&] {  // jobs run one after the other: the workspace is this one's
    workspace_.Reset();
    ExecutionContext context{*device_, workspace_, nullptr};
    context.sparsity = spec().sparsity;
    status = GuardMemory([&] { return body(choice, result, context); });
    workspace_.Reset();
  });
  ATTN_RETURN_IF_ERROR(status);
  result.implementation = choice.selection.row->name;
  result.reason = choice.selection.reason;
  return result;
}

absl::StatusOr<std::unique_ptr<AttentionModule>> MultiModelAttentionAdapter::Module(
    const LayerRef& layer) const {
  return CreateAttentionModule(model_, layer, config_.factory);
}

}  // namespace attn
