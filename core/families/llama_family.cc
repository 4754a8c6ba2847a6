#include "core/families/llama_family.h"

#include "core/error.h"
#include "core/families/causal_decoder.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadLlamaModel(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(const CausalDecoder decoder, ReadCausalDecoder(config, {}));
  ATTN_ASSIGN_OR_RETURN(const bool bias, config.BoolOr("attention_bias", false));
  return DecoderModel(decoder, {decoder.layer}, bias, bias);
}

}  // namespace attn
