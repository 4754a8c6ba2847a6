#include "core/families/whisper_family.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

// The layers of the half whose fields begin with `half`. The library multiplies queries by
// 1 / sqrt(head_dim) before it takes them apart into heads, which is the default scale.
absl::StatusOr<LayerSpec> ReadLayers(ConfigReader& config, const std::string& half,
                                     std::uint32_t hidden_size) {
  const std::string heads = half + "_attention_heads";
  LayerSpec layer;
  ATTN_ASSIGN_OR_RETURN(layer.repeat, config.RequiredInt(half + "_layers", 1, kMaxLayers));
  ATTN_ASSIGN_OR_RETURN(layer.num_heads, config.RequiredInt(heads, 1, kMaxHeads));
  if (hidden_size % layer.num_heads != 0) {
    return config.Bad("d_model",
                      absl::StrCat("which ", heads, " ", layer.num_heads, " does not divide"));
  }
  layer.num_kv_heads = layer.num_heads;
  layer.head_dim = hidden_size / layer.num_heads;
  layer.value_dim = layer.head_dim;
  layer.options.is_causal = false;
  return layer;
}

StackTensors TensorsOf(const ProjectionNames& names) {
  return {.prefixes = {"model.", ""}, .namings = {names}, .key_bias = false};
}

}  // namespace

absl::StatusOr<FamilyModel> ReadWhisperModel(ConfigReader& config) {
  // WhisperForCausalLM has a decoder alone and says so.
  ATTN_ASSIGN_OR_RETURN(const bool both, config.BoolOr("is_encoder_decoder", true));
  if (!both) return config.Unsupported("is_encoder_decoder");
  ATTN_ASSIGN_OR_RETURN(const std::uint32_t hidden_size,
                        config.RequiredInt("d_model", 1, kMaxHiddenSize));
  LayerStack encoder;
  encoder.name = "encoder";
  encoder.modality = Modality::kMultimodal;  // audio: there is no modality of its own
  encoder.hidden_size = hidden_size;
  ATTN_ASSIGN_OR_RETURN(encoder.max_positions,
                        config.RequiredInt("max_source_positions", 1, kMaxPositions));
  ATTN_ASSIGN_OR_RETURN(const LayerSpec encoder_layer, ReadLayers(config, "encoder", hidden_size));
  encoder.self_attention = {encoder_layer};

  LayerStack decoder;
  decoder.name = "decoder";
  decoder.modality = Modality::kLanguage;
  decoder.hidden_size = hidden_size;
  ATTN_ASSIGN_OR_RETURN(decoder.max_positions,
                        config.RequiredInt("max_target_positions", 1, kMaxPositions));
  ATTN_ASSIGN_OR_RETURN(LayerSpec decoder_layer, ReadLayers(config, "decoder", hidden_size));
  LayerSpec cross_layer = decoder_layer;
  cross_layer.encoder_hidden_size = hidden_size;
  decoder_layer.options.is_causal = true;
  decoder.self_attention = {decoder_layer};
  decoder.cross_attention = {cross_layer};

  FamilyModel model;
  model.modality = Modality::kMultimodal;
  model.stacks = {std::move(encoder), std::move(decoder)};
  model.self_attention = {
      TensorsOf({"encoder.layers.{}.self_attn.q_proj", "encoder.layers.{}.self_attn.k_proj",
                 "encoder.layers.{}.self_attn.v_proj", "encoder.layers.{}.self_attn.out_proj"}),
      TensorsOf({"decoder.layers.{}.self_attn.q_proj", "decoder.layers.{}.self_attn.k_proj",
                 "decoder.layers.{}.self_attn.v_proj", "decoder.layers.{}.self_attn.out_proj"})};
  model.cross_attention = {
      {},
      TensorsOf({"decoder.layers.{}.encoder_attn.q_proj", "decoder.layers.{}.encoder_attn.k_proj",
                 "decoder.layers.{}.encoder_attn.v_proj",
                 "decoder.layers.{}.encoder_attn.out_proj"})};
  return model;
}

}  // namespace attn
