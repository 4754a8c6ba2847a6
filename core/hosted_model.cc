#include "core/hosted_model.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

constexpr std::uint64_t kMaxLayers = 4096;
constexpr std::uint32_t kMaxHeads = 65536;
constexpr std::uint32_t kMaxDim = 1u << 20;
constexpr std::size_t kMaxStacks = 16;

absl::Status CheckRange(const std::string& field, std::uint64_t value, std::uint64_t bound) {
  if (value >= 1 && value <= bound) return absl::OkStatus();
  return InvalidField(field,
                      absl::StrCat(field, " is ", value, ", but must be between 1 and ", bound));
}

absl::Status CheckHeadValues(const std::string& field,
                             const std::optional<std::vector<float>>& values, std::uint32_t heads) {
  if (!values || values->empty() || values->size() == heads) return absl::OkStatus();
  return InvalidField(
      field, absl::StrCat(field, " has ", values->size(), " values for ", heads, " heads"));
}

// Fills what the API lets unset (KV heads as query heads, values as wide as keys) and checks the
// rest.
absl::Status CompleteLayer(const std::string& field, LayerSpec& layer) {
  if (layer.repeat == 0) layer.repeat = 1;
  if (layer.num_kv_heads == 0) layer.num_kv_heads = layer.num_heads;
  if (layer.value_dim == 0) layer.value_dim = layer.head_dim;
  ATTN_RETURN_IF_ERROR(CheckRange(absl::StrCat(field, ".num_heads"), layer.num_heads, kMaxHeads));
  ATTN_RETURN_IF_ERROR(
      CheckRange(absl::StrCat(field, ".num_kv_heads"), layer.num_kv_heads, kMaxHeads));
  ATTN_RETURN_IF_ERROR(CheckRange(absl::StrCat(field, ".head_dim"), layer.head_dim, kMaxHeads));
  ATTN_RETURN_IF_ERROR(CheckRange(absl::StrCat(field, ".value_dim"), layer.value_dim, kMaxHeads));
  if (layer.num_heads % layer.num_kv_heads != 0) {
    return InvalidField(absl::StrCat(field, ".num_kv_heads"),
                        absl::StrCat(field, ".num_kv_heads is ", layer.num_kv_heads,
                                     ", which does not divide num_heads, ", layer.num_heads));
  }
  ATTN_RETURN_IF_ERROR(CheckHeadValues(absl::StrCat(field, ".options.alibi_slopes"),
                                       layer.options.alibi_slopes, layer.num_heads));
  return CheckHeadValues(absl::StrCat(field, ".options.sink_logits"), layer.options.sink_logits,
                         layer.num_heads);
}

absl::Status CompleteRuns(const std::string& field, std::vector<LayerSpec>& runs,
                          std::uint64_t& layers) {
  for (std::size_t i = 0; i < runs.size(); ++i) {
    ATTN_RETURN_IF_ERROR(CompleteLayer(absl::StrCat(field, "[", i, "]"), runs[i]));
    layers += runs[i].repeat;
    if (layers > kMaxLayers) {
      return InvalidField(field, absl::StrCat(field, " makes more than ", kMaxLayers, " layers"));
    }
  }
  return absl::OkStatus();
}

// An encoder's hidden states are as wide as the stack's own where the spec does not say.
absl::Status CompleteEncoderSizes(const std::string& field, LayerStack& stack) {
  for (std::size_t i = 0; i < stack.cross_attention.size(); ++i) {
    LayerSpec& layer = stack.cross_attention[i];
    if (layer.encoder_hidden_size == 0) layer.encoder_hidden_size = stack.hidden_size;
    if (layer.encoder_hidden_size <= kMaxDim) continue;
    const std::string name = absl::StrCat(field, "[", i, "].encoder_hidden_size");
    return InvalidField(
        name, absl::StrCat(name, " is ", layer.encoder_hidden_size, ", more than ", kMaxDim));
  }
  return absl::OkStatus();
}

absl::Status CompleteSpec(ModelSpec& spec) {
  if (spec.stacks.empty() || spec.stacks.size() > kMaxStacks) {
    return InvalidField("spec.stacks", absl::StrCat("spec.stacks has ", spec.stacks.size(),
                                                    " entries, but must have 1 to ", kMaxStacks,
                                                    " where no weights are named"));
  }
  std::uint64_t layers = 0;
  for (std::size_t i = 0; i < spec.stacks.size(); ++i) {
    LayerStack& stack = spec.stacks[i];
    const std::string field = absl::StrCat("spec.stacks[", i, "]");
    for (std::size_t j = 0; j < i; ++j) {
      if (spec.stacks[j].name == stack.name) {
        return InvalidField(absl::StrCat(field, ".name"),
                            absl::StrCat(field, ".name repeats '", stack.name, "'"));
      }
    }
    if (stack.hidden_size > kMaxDim) {
      return InvalidField(
          absl::StrCat(field, ".hidden_size"),
          absl::StrCat(field, ".hidden_size is ", stack.hidden_size, ", more than ", kMaxDim));
    }
    ATTN_RETURN_IF_ERROR(
        CompleteRuns(absl::StrCat(field, ".self_attention"), stack.self_attention, layers));
    ATTN_RETURN_IF_ERROR(
        CompleteRuns(absl::StrCat(field, ".cross_attention"), stack.cross_attention, layers));
    ATTN_RETURN_IF_ERROR(CompleteEncoderSizes(absl::StrCat(field, ".cross_attention"), stack));
  }
  if (layers == 0) return InvalidField("spec.stacks", "spec.stacks has no layers");
  if (spec.dtype == DType::kUnspecified) spec.dtype = DType::kFloat32;
  if (!IsFloating(spec.dtype)) {
    return InvalidField("spec.dtype", absl::StrCat("spec.dtype is ", DTypeName(spec.dtype),
                                                   ", but must be float32, float16 or bfloat16"));
  }
  return CheckCacheDType("spec.cache_dtype", spec.cache_dtype);
}

// One of a stack's lists of layers; `field` names it.
absl::StatusOr<std::vector<HostedLayer>> MakeLayers(const std::string& field, const ModelSpec& spec,
                                                    const LayerStack& stack,
                                                    const std::vector<LayerSpec>& runs,
                                                    std::vector<LayerWeights> weights) {
  std::vector<HostedLayer> layers;
  for (std::size_t run = 0; run < runs.size(); ++run) {
    HostedLayer layer;
    layer.spec = std::make_shared<const LayerSpec>(runs[run]);
    layer.hidden_size = stack.hidden_size;
    layer.max_positions = stack.max_positions;
    layer.dtype = spec.dtype;
    if (runs[run].rotary) {
      ATTN_ASSIGN_OR_RETURN(
          layer.rotary, Rotary::Create(absl::StrCat(field, "[", run, "].rotary"), *runs[run].rotary,
                                       runs[run].head_dim, stack.max_positions));
    }
    for (std::uint32_t i = 0; i < runs[run].repeat; ++i) {
      HostedLayer& own = layers.emplace_back(layer);
      if (layers.size() > weights.size()) continue;
      own.weights = std::make_shared<const LayerWeights>(std::move(weights[layers.size() - 1]));
    }
  }
  return layers;
}

}  // namespace

Modality ModalityOf(const ModelSpec& spec, const LayerRef& ref) {
  const bool only = ref.stack.empty() && spec.stacks.size() == 1;
  for (const LayerStack& stack : spec.stacks) {
    if (!only && stack.name != ref.stack) continue;
    if (ref.kind == AttentionKind::kCross) return Modality::kMultimodal;
    return stack.modality == Modality::kUnspecified ? spec.modality : stack.modality;
  }
  return Modality::kUnspecified;
}

AttentionShape PlainShape(const HostedLayer& layer) {
  const LayerSpec& spec = *layer.spec;
  AttentionShape shape;
  shape.batch = shape.q_len = shape.kv_len = shape.pairs = shape.longest_pairs = 1;
  shape.num_heads = spec.num_heads;
  shape.num_kv_heads = spec.num_kv_heads;
  shape.head_dim = spec.head_dim;
  shape.value_dim = spec.value_dim;
  shape.dtype = shape.output_dtype = layer.dtype;
  const AttentionOptions& options = spec.options;
  shape.is_causal = options.is_causal.value_or(false);
  shape.has_window =
      options.window_left.value_or(-1) >= 0 || options.window_right.value_or(-1) >= 0;
  shape.has_soft_cap = options.soft_cap.value_or(0.0) > 0.0;
  shape.has_alibi = options.alibi_slopes && !options.alibi_slopes->empty();
  shape.has_sinks = options.sink_logits && !options.sink_logits->empty();
  return shape;
}

absl::Status RequireWeights(const HostedLayer& layer, const std::string& model) {
  if (layer.weights != nullptr) return absl::OkStatus();
  return MakeError(absl::StatusCode::kFailedPrecondition, "MODEL_HAS_NO_WEIGHTS",
                   absl::StrCat("model '", model,
                                "' was loaded without weights: it serves Attend, not Forward"));
}

absl::Status CheckCacheDType(const std::string& field, DType dtype) {
  if (dtype == DType::kUnspecified || IsFloating(dtype) || dtype == DType::kInt8) {
    return absl::OkStatus();
  }
  return InvalidField(field, absl::StrCat(field, " is ", DTypeName(dtype),
                                          ", but must be float32, float16, bfloat16 or int8"));
}

absl::StatusOr<std::shared_ptr<const HostedModel>> HostedModel::Create(const ModelSpec& spec,
                                                                       const LoadOptions& options) {
  LoadedModel loaded;
  loaded.spec = spec;
  if (!spec.weights.empty()) {
    ATTN_ASSIGN_OR_RETURN(loaded, LoadModelDirectory(spec, options));
  }
  ATTN_RETURN_IF_ERROR(CompleteSpec(loaded.spec));
  loaded.stacks.resize(loaded.spec.stacks.size());
  auto model = std::shared_ptr<HostedModel>(new HostedModel);
  for (std::size_t i = 0; i < loaded.spec.stacks.size(); ++i) {
    const LayerStack& stack = loaded.spec.stacks[i];
    const std::string field = absl::StrCat("spec.stacks[", i, "]");
    Stack& made = model->stacks_.emplace_back();
    made.name = stack.name;
    ATTN_ASSIGN_OR_RETURN(
        made.self_attention,
        MakeLayers(field + ".self_attention", loaded.spec, stack, stack.self_attention,
                   std::move(loaded.stacks[i].self_attention)));
    ATTN_ASSIGN_OR_RETURN(
        made.cross_attention,
        MakeLayers(field + ".cross_attention", loaded.spec, stack, stack.cross_attention,
                   std::move(loaded.stacks[i].cross_attention)));
    for (HostedLayer& layer : made.cross_attention) layer.kind = AttentionKind::kCross;
  }
  for (const HostedLayer* layer : model->Layers()) {
    if (layer->weights != nullptr) model->weight_bytes_ += layer->weights->bytes();
  }
  model->spec_ = std::move(loaded.spec);
  return std::shared_ptr<const HostedModel>(std::move(model));
}

absl::StatusOr<const HostedLayer*> HostedModel::Find(const LayerRef& ref) const {
  const Stack* found = ref.stack.empty() && stacks_.size() == 1 ? &stacks_.front() : nullptr;
  for (const Stack& stack : stacks_) {
    if (stack.name == ref.stack) found = &stack;
  }
  if (found == nullptr) {
    return MakeError(absl::StatusCode::kNotFound, "STACK_NOT_FOUND",
                     absl::StrCat("model '", spec_.name, "' has no stack '", ref.stack, "'"),
                     {{"field", "layer.stack"}});
  }
  const bool cross = ref.kind == AttentionKind::kCross;
  const std::vector<HostedLayer>& layers = cross ? found->cross_attention : found->self_attention;
  if (ref.layer >= layers.size()) {
    return MakeError(
        absl::StatusCode::kNotFound, "LAYER_NOT_FOUND",
        absl::StrCat("layer is ", ref.layer, ", but model '", spec_.name, "' has ", layers.size(),
                     cross ? " cross-attention layers" : " self-attention layers"),
        {{"field", "layer.layer"}, {"layers", absl::StrCat(layers.size())}});
  }
  return &layers[ref.layer];
}

std::vector<const HostedLayer*> HostedModel::Layers() const {
  std::vector<const HostedLayer*> layers;
  for (const Stack& stack : stacks_) {
    for (const HostedLayer& layer : stack.self_attention) layers.push_back(&layer);
    for (const HostedLayer& layer : stack.cross_attention) layers.push_back(&layer);
  }
  return layers;
}

}  // namespace attn
