#include "core/families/phi3_family.h"

#include <utility>
#include <vector>

#include "core/error.h"
#include "core/families/causal_decoder.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadPhi3Model(ConfigReader& config) {
  const RotaryDefaults rotary{.original_positions = 4096, .partial = true, .longrope_alone = true};
  ATTN_ASSIGN_OR_RETURN(const CausalDecoder decoder, ReadCausalDecoder(config, {.rotary = rotary}));
  ATTN_ASSIGN_OR_RETURN(const std::uint32_t window, ReadSlidingWindow(config, 0));
  ATTN_ASSIGN_OR_RETURN(
      std::vector<LayerSpec> layers,
      LayersWithWindow(config, decoder, std::vector<bool>(decoder.layer.repeat, window != 0),
                       window));
  FamilyModel model = DecoderModel(decoder, std::move(layers), false, false);
  model.self_attention[0].namings = {
      {.output = "layers.{}.self_attn.o_proj", .query_key_value = "layers.{}.self_attn.qkv_proj"}};
  return model;
}

}  // namespace attn
