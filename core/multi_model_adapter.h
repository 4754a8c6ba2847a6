// A model's attention for programs that link core, whatever its modality: one object with the
// model, a device and its memory, one call for every layer. What distinguishes modalities is data
// (the layers' options, the stacks' modality); this is the place that knows what follows from it:
//   language    causal where nothing else is said; positions, windows, soft caps and sinks are the
//               layer's; a past may be carried
//   vision      bidirectional where nothing else is said; every call brings all of its patches, so
//               that a past is refused
//   multimodal  cross-attention: queries of one stack, keys and values of another one's output,
//               bidirectional where nothing else is said
// Options that a spec, a model directory or a call sets always win.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "core/attention_manager.h"
#include "core/factory.h"

namespace attn {

struct AdapterConfig {
  FactoryOptions factory;  // where models lie, and the table of implementations
  int threads = 0;         // 0: every core that this process may use
  std::size_t max_workspace_bytes = std::size_t{4} << 30;  // of one execution
};

struct AdapterTensor {
  Buffer buffer;
  MutableTensorView view;  // undefined: not asked for
};

struct AdapterResult {
  AdapterTensor output;
  AdapterTensor attention_weights;
  AdapterTensor lse;
  AdapterTensor present_key;
  AdapterTensor present_value;
  std::string implementation;  // that executed
  std::string reason;          // why it did
};

// `spec` with what its stacks' modalities imply for layers that do not say whether they are causal.
ModelSpec WithModalityDefaults(ModelSpec spec);

// Safe from several threads: executions take turns on the device.
class MultiModelAttentionAdapter {
 public:
  // Loads spec.weights; a spec without weights gets its modalities' defaults, and serves Attend
  // alone. Fails as HostedModel::Create does, or with NOT_FOUND for an unknown
  // spec.implementation.
  static absl::StatusOr<std::unique_ptr<MultiModelAttentionAdapter>> Create(
      const AdapterConfig& config, const ModelSpec& spec);

  const ModelSpec& spec() const { return model_->spec(); }

  // The layers that work on a modality, stack by stack and in order; cross-attention is multimodal.
  std::vector<LayerRef> Layers(Modality modality) const;

  // The layer's Forward, by the implementation that the server would take: spec.implementation, or
  // what can do the call where that one can't. INVALID_ARGUMENT where the modality excludes what is
  // asked; otherwise as AttentionModule.
  absl::StatusOr<AdapterResult> Forward(const LayerRef& layer, const ForwardInputs& inputs);

  // Attention alone, with the layer's options, on queries, keys and values that the caller
  // projected. It takes no sessions.
  absl::StatusOr<AdapterResult> Attend(const LayerRef& layer, const AttendInputs& inputs);

  // The layer as a module of its own, for programs with a device of their own; it shares the
  // model's parameters and may outlive the adapter.
  absl::StatusOr<std::unique_ptr<AttentionModule>> Module(const LayerRef& layer) const;

 private:
  using Body = absl::FunctionRef<absl::Status(const Choice&, AdapterResult&, ExecutionContext&)>;

  MultiModelAttentionAdapter(const AdapterConfig& config, std::shared_ptr<const HostedModel> model);
  absl::StatusOr<AdapterResult> Execute(AttentionShape shape,
                                        const AttentionProblem::Outputs& outputs, Body body);

  const AdapterConfig config_;
  const std::shared_ptr<const HostedModel> model_;
  const std::unique_ptr<Device> device_;
  Workspace workspace_;
  AttentionManager manager_;
  const ImplementationRow* active_ = nullptr;  // null: "auto"
};

}  // namespace attn
