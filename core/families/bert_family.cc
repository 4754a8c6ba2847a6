#include "core/families/bert_family.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadBertModel(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(const std::string positions,
                        config.StringOr("position_embedding_type", "absolute"));
  // The relative kinds add a learned term to every logit.
  if (positions != "absolute") return config.Unsupported("position_embedding_type");

  LayerStack stack;
  stack.modality = Modality::kLanguage;
  ATTN_ASSIGN_OR_RETURN(stack.hidden_size, config.RequiredInt("hidden_size", 1, kMaxHiddenSize));
  // position_ids index a learned table of this many rows.
  ATTN_ASSIGN_OR_RETURN(stack.max_positions,
                        config.RequiredInt("max_position_embeddings", 1, kMaxPositions));
  LayerSpec layer;
  ATTN_ASSIGN_OR_RETURN(layer.num_heads, config.RequiredInt("num_attention_heads", 1, kMaxHeads));
  ATTN_ASSIGN_OR_RETURN(layer.repeat, config.RequiredInt("num_hidden_layers", 1, kMaxLayers));
  if (stack.hidden_size % layer.num_heads != 0) {
    return config.Bad("hidden_size", absl::StrCat("which num_attention_heads ", layer.num_heads,
                                                  " does not divide"));
  }
  layer.num_kv_heads = layer.num_heads;
  layer.head_dim = stack.hidden_size / layer.num_heads;
  layer.value_dim = layer.head_dim;
  layer.options.is_causal = false;
  stack.self_attention = {layer};

  FamilyModel model;
  model.modality = Modality::kLanguage;
  model.stacks = {std::move(stack)};
  model.self_attention = {StackTensors{
      .prefixes = {"", "bert."},
      .namings = {{"encoder.layer.{}.attention.self.query", "encoder.layer.{}.attention.self.key",
                   "encoder.layer.{}.attention.self.value",
                   "encoder.layer.{}.attention.output.dense"}},
  }};
  return model;
}

}  // namespace attn
