// Mistral (arXiv:2310.06825) as transformers' MistralModel and MistralFor... save it: Llama with a
// sliding window on every layer.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadMistralModel(ConfigReader& config);

}  // namespace attn
