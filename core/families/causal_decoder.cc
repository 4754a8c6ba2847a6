#include "core/families/causal_decoder.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

absl::StatusOr<std::uint32_t> ReadKvHeads(ConfigReader& config, std::uint32_t num_heads,
                                          std::uint32_t fallback) {
  constexpr char kName[] = "num_key_value_heads";
  if (fallback == 0 || config.Mentions(kName)) fallback = num_heads;
  ATTN_ASSIGN_OR_RETURN(const std::uint32_t heads, config.IntOr(kName, fallback, 1, kMaxHeads));
  if (num_heads % heads != 0) {
    return config.Bad(kName, absl::StrCat("which makes ", heads,
                                          ", but must divide num_attention_heads, ", num_heads));
  }
  return heads;
}

absl::StatusOr<std::uint32_t> ReadHeadDim(ConfigReader& config, std::uint32_t hidden_size,
                                          std::uint32_t num_heads, std::uint32_t fallback) {
  if (fallback == 0) {
    if (!config.Has("head_dim") && hidden_size % num_heads != 0) {
      return config.Bad("hidden_size",
                        absl::StrCat("which num_attention_heads ", num_heads, " does not divide"));
    }
    fallback = hidden_size / num_heads;
  }
  return config.IntOr("head_dim", fallback, 1, kMaxHeadDim);
}

}  // namespace

absl::StatusOr<CausalDecoder> ReadCausalDecoder(ConfigReader& config,
                                                const DecoderDefaults& defaults) {
  // Models turned into encoders keep their model_type and say this.
  ATTN_ASSIGN_OR_RETURN(const bool is_causal, config.BoolOr("is_causal", true));
  if (!is_causal) return config.Unsupported("is_causal");
  CausalDecoder decoder;
  LayerSpec& layer = decoder.layer;
  ATTN_ASSIGN_OR_RETURN(decoder.hidden_size, config.RequiredInt("hidden_size", 1, kMaxHiddenSize));
  constexpr char kHeads[] = "num_attention_heads";
  if (defaults.num_heads == 0 && !config.Has(kHeads)) return config.Missing(kHeads);
  ATTN_ASSIGN_OR_RETURN(layer.num_heads, config.IntOr(kHeads, defaults.num_heads, 1, kMaxHeads));
  ATTN_ASSIGN_OR_RETURN(layer.repeat, config.RequiredInt("num_hidden_layers", 1, kMaxLayers));
  ATTN_ASSIGN_OR_RETURN(layer.num_kv_heads,
                        ReadKvHeads(config, layer.num_heads, defaults.num_kv_heads));
  ATTN_ASSIGN_OR_RETURN(
      layer.head_dim, ReadHeadDim(config, decoder.hidden_size, layer.num_heads, defaults.head_dim));
  layer.value_dim = layer.head_dim;
  layer.options.is_causal = true;
  ATTN_ASSIGN_OR_RETURN(layer.rotary, ReadRotary(config, layer.head_dim, defaults.rotary));
  return decoder;
}

absl::StatusOr<std::uint32_t> ReadSlidingWindow(ConfigReader& config, std::uint32_t fallback) {
  constexpr char kName[] = "sliding_window";
  if (config.Mentions(kName)) fallback = 0;
  return config.IntOr(kName, fallback, 1, kMaxPositions);
}

absl::StatusOr<std::vector<bool>> ReadLayerTypes(ConfigReader& config, std::vector<bool> fallback) {
  constexpr char kName[] = "layer_types";
  if (!config.Has(kName)) return fallback;
  const std::size_t layers = fallback.size();
  ATTN_ASSIGN_OR_RETURN(const std::vector<std::string> types,
                        config.RequiredStrings(kName, layers));
  std::vector<bool> slides;
  for (const std::string& type : types) {
    if (type != "sliding_attention" && type != "full_attention") return config.Unsupported(kName);
    slides.push_back(type == "sliding_attention");
  }
  return slides;
}

absl::StatusOr<std::vector<LayerSpec>> LayersWithWindow(const ConfigReader& config,
                                                        const CausalDecoder& decoder,
                                                        const std::vector<bool>& slides,
                                                        std::uint32_t window) {
  std::vector<LayerSpec> runs;
  bool last = false;
  for (const bool sliding : slides) {
    if (sliding && window == 0) {
      return config.Bad("sliding_window", "but layers slide by it");
    }
    if (!runs.empty() && sliding == last) {
      ++runs.back().repeat;
      continue;
    }
    last = sliding;
    LayerSpec& run = runs.emplace_back(decoder.layer);
    run.repeat = 1;
    if (sliding) run.options.window_left = std::int64_t{window} - 1;
  }
  return runs;
}

FamilyModel DecoderModel(const CausalDecoder& decoder, std::vector<LayerSpec> layers, bool qkv_bias,
                         bool output_bias) {
  LayerStack stack;
  stack.modality = Modality::kLanguage;
  stack.hidden_size = decoder.hidden_size;
  stack.self_attention = std::move(layers);
  FamilyModel model;
  model.modality = Modality::kLanguage;
  model.stacks = {std::move(stack)};
  model.self_attention = {StackTensors{
      .prefixes = {"", "model."},
      .namings = {{"layers.{}.self_attn.q_proj", "layers.{}.self_attn.k_proj",
                   "layers.{}.self_attn.v_proj", "layers.{}.self_attn.o_proj"}},
      .query_bias = qkv_bias,
      .key_bias = qkv_bias,
      .value_bias = qkv_bias,
      .output_bias = output_bias,
  }};
  return model;
}

}  // namespace attn
