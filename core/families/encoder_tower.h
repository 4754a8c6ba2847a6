// What CLIP and SigLIP share: encoders of text and of images whose tensors are called
// encoder.layers.N.self_attn.q_proj and so on, two in a directory or each in its own.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

// What an encoder's config class has where the file says nothing: published files say little.
struct TowerDefaults {
  Modality modality = Modality::kUnspecified;
  std::uint32_t hidden_size = 0;
  std::uint32_t num_heads = 0;
  std::uint32_t num_layers = 0;
  std::uint32_t max_positions = 0;  // of a learned table; 0: config has none that bounds positions
  bool is_causal = false;
};

// A stack with the names of its tensors.
struct Tower {
  LayerStack stack;
  StackTensors tensors;
};

// `prefixes`: of "encoder.layers..." in a checkpoint.
absl::StatusOr<Tower> ReadTower(ConfigReader& config, const TowerDefaults& defaults,
                                std::vector<const char*> prefixes);

// The model of a directory that holds one tower.
FamilyModel TowerModel(Tower tower);

// The towers of a model, named, in one.
FamilyModel TwoTowerModel(Tower text, Tower vision);

// A model of both, its towers described by text_config and vision_config. One that classifies
// images has the vision tower alone, by the same model_type. `config_dicts`: where text_config_dict
// or vision_config_dict is set, the class takes that in the place of the other.
absl::StatusOr<FamilyModel> ReadTwoTowers(ConfigReader& config, const TowerDefaults& text,
                                          const TowerDefaults& vision, bool config_dicts);

}  // namespace attn
