#include "core/families/gemma2_family.h"

#include <cmath>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/families/causal_decoder.h"

namespace attn {
namespace {

constexpr double kMaxScalar = 1e9;

}  // namespace

absl::StatusOr<FamilyModel> ReadGemma2Model(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(
      CausalDecoder decoder,
      ReadCausalDecoder(config, {.num_kv_heads = 4, .head_dim = 256, .rotary = {}}));
  ATTN_ASSIGN_OR_RETURN(const double scalar,
                        config.NumberOr("query_pre_attn_scalar", 256.0, 1e-6, kMaxScalar));
  decoder.layer.options.scale = 1.0 / std::sqrt(scalar);
  const bool capped =
      config.Has("attn_logit_softcapping") || !config.Mentions("attn_logit_softcapping");
  ATTN_ASSIGN_OR_RETURN(const double soft_cap,
                        config.NumberOr("attn_logit_softcapping", 50.0, 1e-6, kMaxScalar));
  if (capped) decoder.layer.options.soft_cap = soft_cap;

  ATTN_ASSIGN_OR_RETURN(const std::uint32_t window, ReadSlidingWindow(config, 4096));
  // Published configs repeat the window under a name that transformers does not read.
  config.Ignore("sliding_window_size");
  std::vector<bool> slides;
  for (std::uint32_t i = 0; i < decoder.layer.repeat; ++i) slides.push_back(i % 2 == 0);
  ATTN_ASSIGN_OR_RETURN(slides, ReadLayerTypes(config, std::move(slides)));
  ATTN_ASSIGN_OR_RETURN(std::vector<LayerSpec> layers,
                        LayersWithWindow(config, decoder, slides, window));
  ATTN_ASSIGN_OR_RETURN(const bool bias, config.BoolOr("attention_bias", false));
  return DecoderModel(decoder, std::move(layers), bias, bias);
}

}  // namespace attn
