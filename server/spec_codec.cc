#include "server/spec_codec.h"

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

absl::StatusOr<Modality> ReadModality(const char* field, proto::Modality modality) {
  switch (modality) {
    case proto::MODALITY_UNSPECIFIED:
      return Modality::kUnspecified;
    case proto::MODALITY_LANGUAGE:
      return Modality::kLanguage;
    case proto::MODALITY_VISION:
      return Modality::kVision;
    case proto::MODALITY_MULTIMODAL:
      return Modality::kMultimodal;
    default:
      return InvalidField(
          field, absl::StrCat(field, " is ", static_cast<int>(modality), ", which is no modality"));
  }
}

proto::Modality ToProto(Modality modality) {
  switch (modality) {
    case Modality::kLanguage:
      return proto::MODALITY_LANGUAGE;
    case Modality::kVision:
      return proto::MODALITY_VISION;
    case Modality::kMultimodal:
      return proto::MODALITY_MULTIMODAL;
    case Modality::kUnspecified:
      break;
  }
  return proto::MODALITY_UNSPECIFIED;
}

absl::StatusOr<DType> ReadDType(const char* field, proto::DataType dtype) {
  const DType value = FromProto(dtype);
  if (value == DType::kUnspecified && dtype != proto::DATA_TYPE_UNSPECIFIED) {
    return InvalidField(
        field, absl::StrCat(field, " is ", static_cast<int>(dtype), ", which is no data type"));
  }
  return value;
}

RotaryEmbedding ReadRotary(const proto::RotaryEmbedding& from) {
  RotaryEmbedding rotary;
  rotary.theta = from.theta();
  rotary.rotary_dim = from.rotary_dim();
  rotary.interleaved = from.interleaved();
  rotary.scaling = from.scaling();
  rotary.scaling_parameters.insert(from.scaling_parameters().begin(),
                                   from.scaling_parameters().end());
  rotary.short_factor.assign(from.short_factor().begin(), from.short_factor().end());
  rotary.long_factor.assign(from.long_factor().begin(), from.long_factor().end());
  rotary.axis_sections.assign(from.axis_sections().begin(), from.axis_sections().end());
  rotary.frequencies_per_axis = from.frequencies_per_axis();
  return rotary;
}

void Write(const RotaryEmbedding& rotary, proto::RotaryEmbedding& to) {
  to.set_theta(rotary.theta);
  to.set_rotary_dim(rotary.rotary_dim);
  to.set_interleaved(rotary.interleaved);
  to.set_scaling(rotary.scaling);
  to.mutable_scaling_parameters()->insert(rotary.scaling_parameters.begin(),
                                          rotary.scaling_parameters.end());
  to.mutable_short_factor()->Add(rotary.short_factor.begin(), rotary.short_factor.end());
  to.mutable_long_factor()->Add(rotary.long_factor.begin(), rotary.long_factor.end());
  to.mutable_axis_sections()->Add(rotary.axis_sections.begin(), rotary.axis_sections.end());
  to.set_frequencies_per_axis(rotary.frequencies_per_axis);
}

void Write(const AttentionOptions& options, proto::AttentionOptions& to) {
  if (options.scale) to.set_scale(*options.scale);
  if (options.is_causal) to.set_is_causal(*options.is_causal);
  if (options.window_left) to.set_window_left(*options.window_left);
  if (options.window_right) to.set_window_right(*options.window_right);
  if (options.soft_cap) to.set_soft_cap(*options.soft_cap);
  if (options.alibi_slopes) {
    to.mutable_alibi_slopes()->mutable_values()->Add(options.alibi_slopes->begin(),
                                                     options.alibi_slopes->end());
  }
  if (options.sink_logits) {
    to.mutable_sink_logits()->mutable_values()->Add(options.sink_logits->begin(),
                                                    options.sink_logits->end());
  }
}

LayerSpec ReadLayer(const proto::LayerSpec& from) {
  LayerSpec layer;
  layer.repeat = from.repeat() == 0 ? 1 : from.repeat();
  layer.num_heads = from.num_heads();
  layer.num_kv_heads = from.num_kv_heads();
  layer.head_dim = from.head_dim();
  layer.value_dim = from.value_dim();
  layer.options = attn::server::FromProto(from.options());
  if (from.has_rotary()) layer.rotary = ReadRotary(from.rotary());
  layer.encoder_hidden_size = from.encoder_hidden_size();
  return layer;
}

void Write(const LayerSpec& layer, proto::LayerSpec& to) {
  to.set_repeat(layer.repeat);
  to.set_num_heads(layer.num_heads);
  to.set_num_kv_heads(layer.num_kv_heads);
  to.set_head_dim(layer.head_dim);
  to.set_value_dim(layer.value_dim);
  Write(layer.options, *to.mutable_options());
  if (layer.rotary) Write(*layer.rotary, *to.mutable_rotary());
  to.set_encoder_hidden_size(layer.encoder_hidden_size);
}

}  // namespace

DType FromProto(proto::DataType dtype) {
  switch (dtype) {
    case proto::DATA_TYPE_FLOAT32:
      return DType::kFloat32;
    case proto::DATA_TYPE_FLOAT16:
      return DType::kFloat16;
    case proto::DATA_TYPE_BFLOAT16:
      return DType::kBFloat16;
    case proto::DATA_TYPE_INT32:
      return DType::kInt32;
    case proto::DATA_TYPE_INT64:
      return DType::kInt64;
    case proto::DATA_TYPE_BOOL:
      return DType::kBool;
    case proto::DATA_TYPE_INT8:
      return DType::kInt8;
    default:
      return DType::kUnspecified;
  }
}

proto::DataType ToProto(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return proto::DATA_TYPE_FLOAT32;
    case DType::kFloat16:
      return proto::DATA_TYPE_FLOAT16;
    case DType::kBFloat16:
      return proto::DATA_TYPE_BFLOAT16;
    case DType::kInt32:
      return proto::DATA_TYPE_INT32;
    case DType::kInt64:
      return proto::DATA_TYPE_INT64;
    case DType::kBool:
      return proto::DATA_TYPE_BOOL;
    case DType::kInt8:
      return proto::DATA_TYPE_INT8;
    case DType::kUnspecified:
      break;
  }
  return proto::DATA_TYPE_UNSPECIFIED;
}

AttentionOptions FromProto(const proto::AttentionOptions& from) {
  AttentionOptions options;
  if (from.has_scale()) options.scale = from.scale();
  if (from.has_is_causal()) options.is_causal = from.is_causal();
  if (from.has_window_left()) options.window_left = from.window_left();
  if (from.has_window_right()) options.window_right = from.window_right();
  if (from.has_soft_cap()) options.soft_cap = from.soft_cap();
  if (from.has_alibi_slopes()) {
    options.alibi_slopes.emplace(from.alibi_slopes().values().begin(),
                                 from.alibi_slopes().values().end());
  }
  if (from.has_sink_logits()) {
    options.sink_logits.emplace(from.sink_logits().values().begin(),
                                from.sink_logits().values().end());
  }
  return options;
}

SparsityOptions FromProto(const proto::SparsityOptions& from) {
  SparsityOptions options;
  if (from.has_factor()) options.factor = from.factor();
  if (from.has_mass()) options.mass = from.mass();
  return options;
}

absl::StatusOr<ModelSpec> FromProto(const proto::ModelSpec& from) {
  ModelSpec spec;
  spec.name = from.name();
  ATTN_ASSIGN_OR_RETURN(spec.modality, ReadModality("spec.modality", from.modality()));
  spec.weights = from.weights();
  for (const proto::LayerStack& stack : from.stacks()) {
    LayerStack& to = spec.stacks.emplace_back();
    to.name = stack.name();
    ATTN_ASSIGN_OR_RETURN(to.modality, ReadModality("spec.stacks.modality", stack.modality()));
    to.hidden_size = stack.hidden_size();
    to.max_positions = stack.max_positions();
    for (const proto::LayerSpec& layer : stack.self_attention())
      to.self_attention.push_back(ReadLayer(layer));
    for (const proto::LayerSpec& layer : stack.cross_attention())
      to.cross_attention.push_back(ReadLayer(layer));
  }
  ATTN_ASSIGN_OR_RETURN(spec.dtype, ReadDType("spec.dtype", from.dtype()));
  ATTN_ASSIGN_OR_RETURN(spec.cache_dtype, ReadDType("spec.cache_dtype", from.cache_dtype()));
  spec.implementation = from.implementation();
  spec.allow_approximate = from.allow_approximate();
  spec.instances = from.instances();
  spec.sparsity = FromProto(from.sparsity());
  return spec;
}

proto::ModelSpec ToProto(const ModelSpec& spec) {
  proto::ModelSpec to;
  to.set_name(spec.name);
  to.set_modality(ToProto(spec.modality));
  to.set_weights(spec.weights);
  for (const LayerStack& stack : spec.stacks) {
    proto::LayerStack& message = *to.add_stacks();
    message.set_name(stack.name);
    message.set_modality(ToProto(stack.modality));
    message.set_hidden_size(stack.hidden_size);
    message.set_max_positions(stack.max_positions);
    for (const LayerSpec& layer : stack.self_attention) Write(layer, *message.add_self_attention());
    for (const LayerSpec& layer : stack.cross_attention)
      Write(layer, *message.add_cross_attention());
  }
  to.set_dtype(ToProto(spec.dtype));
  to.set_cache_dtype(ToProto(spec.cache_dtype));
  to.set_implementation(spec.implementation);
  to.set_allow_approximate(spec.allow_approximate);
  to.set_instances(spec.instances);
  if (spec.sparsity.factor) to.mutable_sparsity()->set_factor(*spec.sparsity.factor);
  if (spec.sparsity.mass) to.mutable_sparsity()->set_mass(*spec.sparsity.mass);
  return to;
}

}  // namespace attn::server
