#include "core/families/mistral_family.h"

#include <utility>
#include <vector>

#include "core/error.h"
#include "core/families/causal_decoder.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadMistralModel(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(const CausalDecoder decoder,
                        ReadCausalDecoder(config, {.num_kv_heads = 8, .rotary = {}}));
  ATTN_ASSIGN_OR_RETURN(const std::uint32_t window, ReadSlidingWindow(config, 4096));
  ATTN_ASSIGN_OR_RETURN(
      std::vector<LayerSpec> layers,
      LayersWithWindow(config, decoder, std::vector<bool>(decoder.layer.repeat, window != 0),
                       window));
  return DecoderModel(decoder, std::move(layers), false, false);
}

}  // namespace attn
