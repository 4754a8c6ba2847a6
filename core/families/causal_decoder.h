// What the families that descend from Llama (arXiv:2302.13971) share: a causal decoder with grouped
// key/value heads, rotary embedding and tensors called self_attn.q_proj and so on. A family adds
// what it does differently.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "core/families/family.h"
#include "core/families/rotary_config.h"

namespace attn {

// What a family's config class has where the file says nothing.
struct DecoderDefaults {
  std::uint32_t num_heads = 0;     // 0: must be said
  std::uint32_t num_kv_heads = 0;  // 0: as many as query heads
  std::uint32_t head_dim = 0;      // 0: hidden_size / num_attention_heads
  RotaryDefaults rotary;
};

struct CausalDecoder {
  std::uint32_t hidden_size = 0;
  LayerSpec layer;  // repeated once for every layer, without a window
};

absl::StatusOr<CausalDecoder> ReadCausalDecoder(ConfigReader& config,
                                                const DecoderDefaults& defaults);

// Keys that a sliding layer sees, the query's own among them; 0: no window. null switches it off, a
// file without the field has the class's `fallback`.
absl::StatusOr<std::uint32_t> ReadSlidingWindow(ConfigReader& config, std::uint32_t fallback);

// Which layers slide: what layer_types says, else `fallback`. An unknown type is unsupported.
absl::StatusOr<std::vector<bool>> ReadLayerTypes(ConfigReader& config, std::vector<bool> fallback);

// The layers in runs that are alike: those that slide see `window` keys. A layer that slides where
// there is no window is INVALID_ARGUMENT.
absl::StatusOr<std::vector<LayerSpec>> LayersWithWindow(const ConfigReader& config,
                                                        const CausalDecoder& decoder,
                                                        const std::vector<bool>& slides,
                                                        std::uint32_t window);

// The model of a decoder whose layers are `layers`. Query, key and value have biases together.
FamilyModel DecoderModel(const CausalDecoder& decoder, std::vector<LayerSpec> layers, bool qkv_bias,
                         bool output_bias);

}  // namespace attn
