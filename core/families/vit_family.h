// ViT (arXiv:2010.11929) as transformers' ViTModel and ViTFor... save it.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadVitModel(ConfigReader& config);

}  // namespace attn
