// SigLIP (arXiv:2303.15343) as transformers' SiglipModel, SiglipTextModel, SiglipVisionModel and
// their kin save it: bidirectional encoders of text and of images. The pooling head over patches is
// no layer of the tower, and is not served.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "core/families/encoder_tower.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadSiglipModel(ConfigReader& config);
absl::StatusOr<FamilyModel> ReadSiglipTextModel(ConfigReader& config);
absl::StatusOr<FamilyModel> ReadSiglipVisionModel(ConfigReader& config);

// The vision tower inside another family's model.
absl::StatusOr<Tower> ReadSiglipVisionTower(ConfigReader& config,
                                            std::vector<const char*> prefixes);

}  // namespace attn
