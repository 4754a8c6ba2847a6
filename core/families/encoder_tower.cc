#include "core/families/encoder_tower.h"

#include <algorithm>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

absl::StatusOr<bool> IsImageClassifier(ConfigReader& config) {
  constexpr char kName[] = "architectures";
  if (!config.Has(kName)) return false;
  ATTN_ASSIGN_OR_RETURN(const std::vector<std::string> names, config.RequiredStrings(kName));
  return std::any_of(names.begin(), names.end(), [](const std::string& name) {
    return absl::EndsWith(name, "ForImageClassification");
  });
}

// Of one of two towers; `half` is "text" or "vision".
absl::StatusOr<Tower> ReadHalf(ConfigReader& config, const std::string& half,
                               const TowerDefaults& defaults, bool config_dicts,
                               const char* prefix) {
  std::string name = half + "_config";
  if (config_dicts && config.Has(name + "_dict")) name += "_dict";
  ATTN_ASSIGN_OR_RETURN(ConfigReader object, config.RequiredObject(name));
  ATTN_ASSIGN_OR_RETURN(Tower tower, ReadTower(object, defaults, {prefix}));
  ATTN_RETURN_IF_ERROR(RefuseUnreadAttention(object));
  return tower;
}

}  // namespace

absl::StatusOr<Tower> ReadTower(ConfigReader& config, const TowerDefaults& defaults,
                                std::vector<const char*> prefixes) {
  Tower tower;
  LayerStack& stack = tower.stack;
  stack.modality = defaults.modality;
  ATTN_ASSIGN_OR_RETURN(stack.hidden_size,
                        config.IntOr("hidden_size", defaults.hidden_size, 1, kMaxHiddenSize));
  if (defaults.max_positions != 0) {
    ATTN_ASSIGN_OR_RETURN(
        stack.max_positions,
        config.IntOr("max_position_embeddings", defaults.max_positions, 1, kMaxPositions));
  }
  LayerSpec layer;
  ATTN_ASSIGN_OR_RETURN(layer.num_heads,
                        config.IntOr("num_attention_heads", defaults.num_heads, 1, kMaxHeads));
  ATTN_ASSIGN_OR_RETURN(layer.repeat,
                        config.IntOr("num_hidden_layers", defaults.num_layers, 1, kMaxLayers));
  if (stack.hidden_size % layer.num_heads != 0) {
    return config.Bad("num_attention_heads",
                      absl::StrCat("but must divide hidden_size, ", stack.hidden_size,
                                   "; it makes ", layer.num_heads, " heads"));
  }
  layer.num_kv_heads = layer.num_heads;
  layer.head_dim = stack.hidden_size / layer.num_heads;
  layer.value_dim = layer.head_dim;
  layer.options.is_causal = defaults.is_causal;
  stack.self_attention = {layer};
  tower.tensors = {
      .prefixes = std::move(prefixes),
      .namings = {{"encoder.layers.{}.self_attn.q_proj", "encoder.layers.{}.self_attn.k_proj",
                   "encoder.layers.{}.self_attn.v_proj", "encoder.layers.{}.self_attn.out_proj"}}};
  return tower;
}

FamilyModel TowerModel(Tower tower) {
  FamilyModel model;
  model.modality = tower.stack.modality;
  model.stacks = {std::move(tower.stack)};
  model.self_attention = {std::move(tower.tensors)};
  return model;
}

FamilyModel TwoTowerModel(Tower text, Tower vision) {
  text.stack.name = "text";
  vision.stack.name = "vision";
  FamilyModel model;
  model.modality = Modality::kMultimodal;
  model.stacks = {std::move(text.stack), std::move(vision.stack)};
  model.self_attention = {std::move(text.tensors), std::move(vision.tensors)};
  return model;
}

absl::StatusOr<FamilyModel> ReadTwoTowers(ConfigReader& config, const TowerDefaults& text,
                                          const TowerDefaults& vision, bool config_dicts) {
  ATTN_ASSIGN_OR_RETURN(Tower images,
                        ReadHalf(config, "vision", vision, config_dicts, "vision_model."));
  ATTN_ASSIGN_OR_RETURN(const bool classifier, IsImageClassifier(config));
  if (classifier) return TowerModel(std::move(images));
  ATTN_ASSIGN_OR_RETURN(Tower words, ReadHalf(config, "text", text, config_dicts, "text_model."));
  return TwoTowerModel(std::move(words), std::move(images));
}

}  // namespace attn
