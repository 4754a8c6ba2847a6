#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/families/bert_family.h"
#include "core/families/family.h"
#include "core/families/vit_family.h"

namespace attn {
namespace {

constexpr Family kFamilies[] = {
    {"bert", ReadBertModel},
    {"vit", ReadVitModel},
};

// Fields by which the configs of transformers change attention or how its weights are stored. A
// config that sets one of them means it: a family that does not read it would compute something
// else.
constexpr const char* kAttentionFields[] = {
    "add_cross_attention",
    "alibi",
    "attention_bias",
    "attention_chunk_size",
    "attention_multiplier",
    "attention_type",
    "attn_logit_softcapping",
    "clip_qkv",
    "compression_config",
    "embedding_size",
    "head_dim",
    "is_decoder",
    "is_encoder_decoder",
    "kv_lora_rank",
    "layer_types",
    "num_key_value_heads",
    "partial_rotary_factor",
    "position_embedding_type",
    "pruned_heads",
    "qk_layernorm",
    "qk_norm",
    "qkv_bias",
    "quantization_config",
    "query_pre_attn_scalar",
    "relative_attention",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "scale_attn_by_inverse_layer_idx",
    "sliding_window",
    "use_alibi",
    "use_qk_norm",
    "use_sliding_window",
};

}  // namespace

std::span<const Family> BuiltinFamilies() { return kFamilies; }

absl::StatusOr<FamilyModel> ReadFamilyModel(ConfigReader& config,
                                            std::span<const Family> families) {
  ATTN_ASSIGN_OR_RETURN(const std::string model_type, config.RequiredString("model_type"));
  for (const Family& family : families) {
    if (model_type != family.model_type) continue;
    ATTN_ASSIGN_OR_RETURN(FamilyModel model, family.read(config));
    ATTN_RETURN_IF_ERROR(config.RefuseUnread(kAttentionFields));
    return model;
  }
  return config.Unsupported("model_type");
}

}  // namespace attn
