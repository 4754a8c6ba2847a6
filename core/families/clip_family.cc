#include "core/families/clip_family.h"

#include <utility>

#include "core/error.h"
#include "core/families/encoder_tower.h"

namespace attn {
namespace {

constexpr TowerDefaults kText{.modality = Modality::kLanguage,
                              .hidden_size = 512,
                              .num_heads = 8,
                              .num_layers = 12,
                              .max_positions = 77,
                              .is_causal = true};
// No limit of positions: the learned table is added whole to the patches, and interpolated for
// other image sizes.
constexpr TowerDefaults kVision{
    .modality = Modality::kVision, .hidden_size = 768, .num_heads = 12, .num_layers = 12};

}  // namespace

absl::StatusOr<FamilyModel> ReadClipModel(ConfigReader& config) {
  return ReadTwoTowers(config, kText, kVision, true);
}

absl::StatusOr<FamilyModel> ReadClipTextModel(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(Tower tower, ReadTower(config, kText, {"text_model.", ""}));
  return TowerModel(std::move(tower));
}

absl::StatusOr<FamilyModel> ReadClipVisionModel(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(Tower tower, ReadTower(config, kVision, {"vision_model.", ""}));
  return TowerModel(std::move(tower));
}

}  // namespace attn
