#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/families/bert_family.h"
#include "core/families/clip_family.h"
#include "core/families/family.h"
#include "core/families/gemma2_family.h"
#include "core/families/gemma3_family.h"
#include "core/families/gpt_oss_family.h"
#include "core/families/llama_family.h"
#include "core/families/mistral_family.h"
#include "core/families/phi3_family.h"
#include "core/families/qwen2_vl_family.h"
#include "core/families/qwen_family.h"
#include "core/families/siglip_family.h"
#include "core/families/vit_family.h"
#include "core/families/whisper_family.h"

namespace attn {
namespace {

constexpr Family kFamilies[] = {
    {"bert", ReadBertModel},
    {"clip", ReadClipModel},
    {"clip_text_model", ReadClipTextModel},
    {"clip_vision_model", ReadClipVisionModel},
    {"gemma2", ReadGemma2Model},
    {"gemma3", ReadGemma3Model},
    {"gemma3_text", ReadGemma3TextModel},
    {"gpt_oss", ReadGptOssModel},
    {"llama", ReadLlamaModel},
    {"mistral", ReadMistralModel},
    {"phi3", ReadPhi3Model},
    {"qwen2", ReadQwen2Model},
    {"qwen2_vl", ReadQwen2VlModel},
    {"qwen2_vl_text", ReadQwen2VlTextModel},
    {"qwen3", ReadQwen3Model},
    {"siglip", ReadSiglipModel},
    {"siglip_text_model", ReadSiglipTextModel},
    {"siglip_vision_model", ReadSiglipVisionModel},
    {"vit", ReadVitModel},
    {"whisper", ReadWhisperModel},
};

// Fields by which the configs of transformers change attention or how its weights are stored. A
// config that sets one of them means it: a family that does not read it would compute something
// else.
constexpr const char* kAttentionFields[] = {
    "add_cross_attention",
    "alibi",
    "alibi_bias_max",
    "attention_bias",
    "attention_chunk_size",
    "attention_head_dim",
    "attention_in_multiplier",
    "attention_k_eq_v",
    "attention_logit_cap",
    "attention_multiplier",
    "attention_out_bias",
    "attention_out_multiplier",
    "attention_type",
    "attention_types",
    "attention_value_scale",
    "attention_window",
    "attention_window_size",
    "attn_config",
    "attn_logit_softcapping",
    "attn_scale",
    "attn_temperature_tuning",
    "attn_type",
    "clip_qkv",
    "compression_config",
    "dual_chunk_attention_config",
    "embedding_size",
    "fullatt_block_indexes",
    "global_attn_every_n_layers",
    "head_dim",
    "is_causal",
    "is_decoder",
    "is_encoder_decoder",
    "key_bias",
    "kv_channels",
    "kv_lora_rank",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "local_attention",
    "max_window_layers",
    "mrope_interleaved",
    "mrope_section",
    "multi_query",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "num_key_value_heads",
    "num_key_value_heads_per_layer",
    "num_kv_heads",
    "num_kv_shared_layers",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "position_embedding_type",
    "pruned_heads",
    "q_lora_rank",
    "qk_layernorm",
    "qk_ln",
    "qk_norm",
    "qk_norm_type",
    "qkv_bias",
    "quantization_config",
    "query_bias",
    "query_pre_attn_scalar",
    "relative_attention",
    "rope_interleave",
    "rope_interleaved",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_scaling_layers",
    "rope_theta",
    "rotary_dim",
    "rotary_emb_base",
    "rotary_embedding_base",
    "rotary_pct",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "sliding_window",
    "sliding_window_pattern",
    "sliding_window_size",
    "sliding_windows",
    "softcap",
    "softmax_scale",
    "use_alibi",
    "use_attention_bias",
    "use_bidirectional_attention",
    "use_mrope",
    "use_qk_norm",
    "use_qkv_bias",
    "use_rotary_embedding",
    "use_sliding_window",
    "v_head_dim",
    "value_bias",
};

}  // namespace

std::span<const Family> BuiltinFamilies() { return kFamilies; }

absl::Status RefuseUnreadAttention(const ConfigReader& object) {
  return object.RefuseUnread(kAttentionFields);
}

absl::StatusOr<FamilyModel> ReadFamilyModel(ConfigReader& config,
                                            std::span<const Family> families) {
  ATTN_ASSIGN_OR_RETURN(const std::string model_type, config.RequiredString("model_type"));
  for (const Family& family : families) {
    if (model_type != family.model_type) continue;
    ATTN_ASSIGN_OR_RETURN(FamilyModel model, family.read(config));
    ATTN_RETURN_IF_ERROR(RefuseUnreadAttention(config));
    return model;
  }
  return config.Unsupported("model_type");
}

}  // namespace attn
