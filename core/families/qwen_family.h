// Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388) as transformers' Qwen2Model, Qwen3Model and
// their ...For... save them.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadQwen2Model(ConfigReader& config);
absl::StatusOr<FamilyModel> ReadQwen3Model(ConfigReader& config);

}  // namespace attn
