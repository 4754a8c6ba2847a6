#include "core/families/gpt_oss_family.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "core/error.h"
#include "core/families/causal_decoder.h"

namespace attn {
namespace {

// Checkpoints hold their experts in MXFP4; what is listed as not converted stays as it was.
absl::Status CheckQuantization(ConfigReader& config) {
  constexpr char kName[] = "quantization_config";
  if (!config.Has(kName)) return absl::OkStatus();
  ATTN_ASSIGN_OR_RETURN(ConfigReader quantization, config.RequiredObject(kName));
  ATTN_ASSIGN_OR_RETURN(const std::string method, quantization.StringOr("quant_method", ""));
  if (method != "mxfp4" || !quantization.Has("modules_to_not_convert")) {
    return config.Unsupported(kName);
  }
  ATTN_ASSIGN_OR_RETURN(const std::vector<std::string> plain,
                        quantization.RequiredStrings("modules_to_not_convert"));
  for (const std::string& module : plain) {
    if (absl::EndsWith(module, "layers.*.self_attn")) return absl::OkStatus();
  }
  return config.Unsupported(kName);
}

RotaryEmbedding DefaultRotary(std::uint32_t head_dim, double theta) {
  RotaryEmbedding rotary;
  rotary.theta = theta;
  rotary.rotary_dim = head_dim;
  rotary.scaling = "yarn";
  rotary.scaling_parameters = {{"factor", 32.0},
                               {"beta_fast", 32.0},
                               {"beta_slow", 1.0},
                               {"truncate", 0.0},
                               {"original_max_position_embeddings", 4096.0}};
  return rotary;
}

}  // namespace

absl::StatusOr<FamilyModel> ReadGptOssModel(ConfigReader& config) {
  ATTN_RETURN_IF_ERROR(CheckQuantization(config));
  ATTN_ASSIGN_OR_RETURN(
      CausalDecoder decoder,
      ReadCausalDecoder(config,
                        {.num_kv_heads = 8, .head_dim = 64, .rotary = {.theta = 150000.0}}));
  if (!config.Has("rope_parameters") && !config.Has("rope_scaling")) {
    decoder.layer.rotary = DefaultRotary(decoder.layer.head_dim, decoder.layer.rotary->theta);
  }
  ATTN_ASSIGN_OR_RETURN(const std::uint32_t window, ReadSlidingWindow(config, 128));
  std::vector<bool> slides;
  for (std::uint32_t i = 0; i < decoder.layer.repeat; ++i) slides.push_back(i % 2 == 0);
  ATTN_ASSIGN_OR_RETURN(slides, ReadLayerTypes(config, std::move(slides)));
  ATTN_ASSIGN_OR_RETURN(std::vector<LayerSpec> layers,
                        LayersWithWindow(config, decoder, slides, window));
  ATTN_ASSIGN_OR_RETURN(const bool bias, config.BoolOr("attention_bias", true));
  FamilyModel model = DecoderModel(decoder, std::move(layers), bias, bias);
  model.self_attention[0].sinks = "layers.{}.self_attn.sinks";
  return model;
}

}  // namespace attn
