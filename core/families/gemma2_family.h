// Gemma 2 (arXiv:2408.00118) as transformers' Gemma2Model and Gemma2For... save it: soft-capped
// scores, windows on every other layer.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadGemma2Model(ConfigReader& config);

}  // namespace attn
