#include "core/families/vit_family.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadVitModel(ConfigReader& config) {
  LayerStack stack;
  stack.modality = Modality::kVision;
  // No limit of positions: the learned table is added whole to the patches, and interpolated for
  // other image sizes.
  stack.max_positions = 0;
  ATTN_ASSIGN_OR_RETURN(stack.hidden_size, config.RequiredInt("hidden_size", 1, kMaxHiddenSize));
  LayerSpec layer;
  ATTN_ASSIGN_OR_RETURN(layer.num_heads, config.RequiredInt("num_attention_heads", 1, kMaxHeads));
  ATTN_ASSIGN_OR_RETURN(layer.repeat, config.RequiredInt("num_hidden_layers", 1, kMaxLayers));
  // transformers 5 lets a config set head_dim; it never writes one that is not set.
  if (!config.Has("head_dim") && stack.hidden_size % layer.num_heads != 0) {
    return config.Bad("hidden_size", absl::StrCat("which num_attention_heads ", layer.num_heads,
                                                  " does not divide"));
  }
  ATTN_ASSIGN_OR_RETURN(
      layer.head_dim,
      config.IntOr("head_dim", stack.hidden_size / layer.num_heads, 1, kMaxHeadDim));
  ATTN_ASSIGN_OR_RETURN(const bool qkv_bias, config.BoolOr("qkv_bias", true));
  layer.num_kv_heads = layer.num_heads;
  layer.value_dim = layer.head_dim;
  layer.options.is_causal = false;
  stack.self_attention = {layer};

  FamilyModel model;
  model.modality = Modality::kVision;
  model.stacks = {std::move(stack)};
  model.self_attention = {StackTensors{
      .prefixes = {"", "vit."},
      // The first is what hubs hold and what save_pretrained writes; the second is what modules are
      // called in transformers 5, written with save_original_format=False.
      .namings = {{"encoder.layer.{}.attention.attention.query",
                   "encoder.layer.{}.attention.attention.key",
                   "encoder.layer.{}.attention.attention.value",
                   "encoder.layer.{}.attention.output.dense"},
                  {"layers.{}.attention.q_proj", "layers.{}.attention.k_proj",
                   "layers.{}.attention.v_proj", "layers.{}.attention.o_proj"}},
      .query_bias = qkv_bias,
      .key_bias = qkv_bias,
      .value_bias = qkv_bias,
  }};
  return model;
}

}  // namespace attn
