#include "core/families/siglip_family.h"

#include <utility>

#include "core/error.h"

namespace attn {
namespace {

constexpr TowerDefaults kText{.modality = Modality::kLanguage,
                              .hidden_size = 768,
                              .num_heads = 12,
                              .num_layers = 12,
                              .max_positions = 64};
// As in ViT, positions have no limit.
constexpr TowerDefaults kVision{
    .modality = Modality::kVision, .hidden_size = 768, .num_heads = 12, .num_layers = 12};

}  // namespace

absl::StatusOr<FamilyModel> ReadSiglipModel(ConfigReader& config) {
  return ReadTwoTowers(config, kText, kVision, false);
}

absl::StatusOr<FamilyModel> ReadSiglipTextModel(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(Tower tower, ReadTower(config, kText, {"text_model.", ""}));
  return TowerModel(std::move(tower));
}

absl::StatusOr<FamilyModel> ReadSiglipVisionModel(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(Tower tower, ReadSiglipVisionTower(config, {"vision_model.", ""}));
  return TowerModel(std::move(tower));
}

absl::StatusOr<Tower> ReadSiglipVisionTower(ConfigReader& config,
                                            std::vector<const char*> prefixes) {
  return ReadTower(config, kVision, std::move(prefixes));
}

}  // namespace attn
