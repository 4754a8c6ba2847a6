// CLIP (arXiv:2103.00020) as transformers' CLIPModel, CLIPTextModel, CLIPVisionModel and their kin
// save it: a causal encoder of text, a bidirectional one of images.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadClipModel(ConfigReader& config);
absl::StatusOr<FamilyModel> ReadClipTextModel(ConfigReader& config);
absl::StatusOr<FamilyModel> ReadClipVisionModel(ConfigReader& config);

}  // namespace attn
