#include "core/families/gemma3_family.h"

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/families/causal_decoder.h"
#include "core/families/siglip_family.h"

namespace attn {
namespace {

constexpr double kMaxScalar = 1e9;
constexpr std::uint32_t kMaxPattern = 65536;

constexpr RotaryDefaults kFullRotary{.theta = 1e6, .layer_type = "full_attention"};
constexpr RotaryDefaults kSlidingRotary{.theta = 10000.0,
                                        .theta_field = "rope_local_base_freq",
                                        .layer_type = "sliding_attention",
                                        .scaled = false};

// What layer_types says, else every `pattern`-th layer is a full one.
absl::StatusOr<std::vector<bool>> ReadSliding(ConfigReader& config, std::uint32_t layers) {
  ATTN_ASSIGN_OR_RETURN(const std::uint32_t pattern,
                        config.IntOr("sliding_window_pattern", 6, 1, kMaxPattern));
  std::vector<bool> slides;
  for (std::uint32_t i = 0; i < layers; ++i) slides.push_back((i + 1) % pattern != 0);
  return ReadLayerTypes(config, std::move(slides));
}

absl::StatusOr<std::vector<LayerSpec>> ReadLayers(ConfigReader& config,
                                                  const CausalDecoder& decoder) {
  ATTN_ASSIGN_OR_RETURN(const bool bidirectional,
                        config.BoolOr("use_bidirectional_attention", false));
  ATTN_ASSIGN_OR_RETURN(std::uint32_t window, ReadSlidingWindow(config, 4096));
  // Half of it to either side.
  if (bidirectional && window != 0) window = window / 2 + 1;
  ATTN_ASSIGN_OR_RETURN(const std::vector<bool> slides, ReadSliding(config, decoder.layer.repeat));
  ATTN_ASSIGN_OR_RETURN(const RotaryEmbedding sliding_rotary,
                        ReadRotary(config, decoder.layer.head_dim, kSlidingRotary));
  ATTN_ASSIGN_OR_RETURN(std::vector<LayerSpec> layers,
                        LayersWithWindow(config, decoder, slides, window));
  for (LayerSpec& layer : layers) {
    if (layer.options.window_left) layer.rotary = sliding_rotary;
    if (!bidirectional) continue;
    layer.options.is_causal = false;
    layer.options.window_right = layer.options.window_left;
  }
  return layers;
}

}  // namespace

absl::StatusOr<FamilyModel> ReadGemma3TextModel(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(
      CausalDecoder decoder,
      ReadCausalDecoder(
          config, {.num_heads = 8, .num_kv_heads = 4, .head_dim = 256, .rotary = kFullRotary}));
  ATTN_ASSIGN_OR_RETURN(const double scalar,
                        config.NumberOr("query_pre_attn_scalar", 256.0, 1e-6, kMaxScalar));
  decoder.layer.options.scale = 1.0 / std::sqrt(scalar);
  ATTN_ASSIGN_OR_RETURN(std::vector<LayerSpec> layers, ReadLayers(config, decoder));
  ATTN_ASSIGN_OR_RETURN(const bool bias, config.BoolOr("attention_bias", false));
  ATTN_ASSIGN_OR_RETURN(const double epsilon, config.NumberOr("rms_norm_eps", 1e-6, 0.0, 1.0));
  FamilyModel model = DecoderModel(decoder, std::move(layers), bias, bias);
  StackTensors& tensors = model.self_attention[0];
  tensors.query_norm = "layers.{}.self_attn.q_norm.weight";
  tensors.key_norm = "layers.{}.self_attn.k_norm.weight";
  tensors.norm_epsilon = static_cast<float>(epsilon);
  tensors.norm_offset = 1.0f;
  return model;
}

absl::StatusOr<FamilyModel> ReadGemma3Model(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(ConfigReader text_config, config.RequiredObject("text_config"));
  ATTN_ASSIGN_OR_RETURN(FamilyModel text, ReadGemma3TextModel(text_config));
  ATTN_RETURN_IF_ERROR(RefuseUnreadAttention(text_config));
  text.self_attention[0].prefixes = {"language_model.model.", "model.language_model.",
                                     "language_model."};

  ATTN_ASSIGN_OR_RETURN(ConfigReader vision_config, config.RequiredObject("vision_config"));
  ATTN_ASSIGN_OR_RETURN(const std::string encoder,
                        vision_config.StringOr("model_type", "siglip_vision_model"));
  if (encoder != "siglip_vision_model") return vision_config.Unsupported("model_type");
  ATTN_ASSIGN_OR_RETURN(
      Tower vision,
      ReadSiglipVisionTower(vision_config,
                            {"vision_tower.vision_model.", "vision_tower.",
                             "model.vision_tower.vision_model.", "model.vision_tower."}));
  ATTN_RETURN_IF_ERROR(RefuseUnreadAttention(vision_config));
  return TwoTowerModel({std::move(text.stacks[0]), std::move(text.self_attention[0])},
                       std::move(vision));
}

}  // namespace attn
