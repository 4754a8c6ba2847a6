#include "core/families/qwen_family.h"

#include <utility>
#include <vector>

#include "core/error.h"
#include "core/families/causal_decoder.h"

namespace attn {

absl::StatusOr<std::vector<LayerSpec>> ReadQwenLayers(ConfigReader& config,
                                                      const CausalDecoder& decoder,
                                                      std::uint32_t first_sliding) {
  ATTN_ASSIGN_OR_RETURN(const bool use_window, config.BoolOr("use_sliding_window", false));
  ATTN_ASSIGN_OR_RETURN(std::uint32_t window, ReadSlidingWindow(config, 4096));
  ATTN_ASSIGN_OR_RETURN(const std::uint32_t first,
                        config.IntOr("max_window_layers", first_sliding, 0, kMaxPositions));
  if (!use_window) window = 0;
  std::vector<bool> slides;
  for (std::uint32_t i = 0; i < decoder.layer.repeat; ++i) {
    slides.push_back(window != 0 && i >= first);
  }
  ATTN_ASSIGN_OR_RETURN(slides, ReadLayerTypes(config, std::move(slides)));
  return LayersWithWindow(config, decoder, slides, window);
}

absl::StatusOr<FamilyModel> ReadQwen2Model(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(const CausalDecoder decoder,
                        ReadCausalDecoder(config, {.num_kv_heads = 32, .rotary = {}}));
  ATTN_ASSIGN_OR_RETURN(std::vector<LayerSpec> layers, ReadQwenLayers(config, decoder, 28));
  return DecoderModel(decoder, std::move(layers), true, false);
}

absl::StatusOr<FamilyModel> ReadQwen3Model(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(
      const CausalDecoder decoder,
      ReadCausalDecoder(config, {.num_kv_heads = 32, .head_dim = 128, .rotary = {}}));
  ATTN_ASSIGN_OR_RETURN(std::vector<LayerSpec> layers, ReadQwenLayers(config, decoder, 28));
  ATTN_ASSIGN_OR_RETURN(const bool bias, config.BoolOr("attention_bias", false));
  ATTN_ASSIGN_OR_RETURN(const double epsilon, config.NumberOr("rms_norm_eps", 1e-6, 0.0, 1.0));
  FamilyModel model = DecoderModel(decoder, std::move(layers), bias, bias);
  model.self_attention[0].query_norm = "layers.{}.self_attn.q_norm.weight";
  model.self_attention[0].key_norm = "layers.{}.self_attn.k_norm.weight";
  model.self_attention[0].norm_epsilon = static_cast<float>(epsilon);
  return model;
}

}  // namespace attn
