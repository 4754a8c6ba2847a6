// Llama 1 to 3 (arXiv:2302.13971) as transformers' LlamaModel and LlamaFor... save it.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadLlamaModel(ConfigReader& config);

}  // namespace attn
