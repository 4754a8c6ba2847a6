#include "core/families/qwen2_vl_family.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/families/causal_decoder.h"
#include "core/families/encoder_tower.h"
#include "core/families/qwen_family.h"

namespace attn {
namespace {

constexpr double kMaxTheta = 1e30;
constexpr std::uint32_t kTextSections[] = {16, 24, 24};
constexpr RotaryDefaults kTextRotary{.theta = 1e6, .axis_sections = kTextSections};

// The class has two names for each of these; a file may have either.
absl::StatusOr<std::uint32_t> ReadEither(ConfigReader& config, const char* name, const char* other,
                                         std::uint32_t fallback, std::uint32_t max) {
  ATTN_ASSIGN_OR_RETURN(fallback, config.IntOr(other, fallback, 1, max));
  ATTN_ASSIGN_OR_RETURN(const std::uint32_t value, config.IntOr(name, fallback, 1, max));
  if (config.Has(other) && value != fallback) {
    return config.Bad(name, absl::StrCat("but ", other, " is ", fallback));
  }
  return value;
}

// Each half of a head's frequencies by one axis, both with the same series.
absl::StatusOr<RotaryEmbedding> ReadPatchRotary(ConfigReader& config, std::uint32_t head_dim) {
  RotaryEmbedding rotary;
  rotary.theta = 10000.0;
  rotary.rotary_dim = head_dim;
  rotary.axis_sections = {head_dim / 4, head_dim / 4};
  rotary.frequencies_per_axis = true;
  constexpr char kName[] = "rope_parameters";
  if (!config.Has(kName)) {
    config.Ignore(kName);
    return rotary;
  }
  ATTN_ASSIGN_OR_RETURN(ConfigReader object, config.RequiredObject(kName));
  ATTN_ASSIGN_OR_RETURN(rotary.theta, object.NumberOr("rope_theta", rotary.theta, 1.0, kMaxTheta));
  ATTN_ASSIGN_OR_RETURN(const std::string type, object.StringOr("rope_type", "axial"));
  if (type != "axial") return object.Unsupported("rope_type");
  for (const std::string& name : object.Names()) {
    if (name != "rope_theta" && name != "rope_type" && object.Has(name)) {
      return object.Unsupported(name);
    }
  }
  return rotary;
}

absl::StatusOr<Tower> ReadVision(ConfigReader& config) {
  Tower tower;
  tower.stack.modality = Modality::kVision;
  // hidden_size is the text's, into which the last patches are merged.
  ATTN_ASSIGN_OR_RETURN(tower.stack.hidden_size,
                        config.IntOr("embed_dim", 1280, 1, kMaxHiddenSize));
  LayerSpec layer;
  ATTN_ASSIGN_OR_RETURN(layer.repeat,
                        ReadEither(config, "depth", "num_hidden_layers", 32, kMaxLayers));
  ATTN_ASSIGN_OR_RETURN(layer.num_heads,
                        ReadEither(config, "num_heads", "num_attention_heads", 16, kMaxHeads));
  if (tower.stack.hidden_size % (4 * std::uint64_t{layer.num_heads}) != 0) {
    return config.Bad("embed_dim", absl::StrCat("which is not a multiple of 4 * num_heads, ",
                                                4 * std::uint64_t{layer.num_heads}));
  }
  layer.num_kv_heads = layer.num_heads;
  layer.head_dim = tower.stack.hidden_size / layer.num_heads;
  layer.value_dim = layer.head_dim;
  layer.options.is_causal = false;
  ATTN_ASSIGN_OR_RETURN(layer.rotary, ReadPatchRotary(config, layer.head_dim));
  tower.stack.self_attention = {layer};
  tower.tensors.prefixes = {"visual.", "model.visual."};
  tower.tensors.namings = {
      {.output = "blocks.{}.attn.proj", .query_key_value = "blocks.{}.attn.qkv"}};
  return tower;
}

// Files without text_config have its fields beside vision_config; where there is one, what is
// beside it is not looked at by the library.
absl::StatusOr<FamilyModel> ReadText(ConfigReader& config) {
  if (!config.Has("text_config")) return ReadQwen2VlTextModel(config);
  ATTN_ASSIGN_OR_RETURN(ConfigReader text_config, config.RequiredObject("text_config"));
  ATTN_ASSIGN_OR_RETURN(FamilyModel text, ReadQwen2VlTextModel(text_config));
  ATTN_RETURN_IF_ERROR(RefuseUnreadAttention(text_config));
  for (const char* name :
       {"layer_types", "max_window_layers", "num_key_value_heads", "rope_parameters",
        "rope_scaling", "rope_theta", "sliding_window", "use_sliding_window"}) {
    config.Ignore(name);
  }
  return text;
}

}  // namespace

absl::StatusOr<FamilyModel> ReadQwen2VlTextModel(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(const CausalDecoder decoder,
                        ReadCausalDecoder(config, {.num_kv_heads = 8, .rotary = kTextRotary}));
  // The library's layers do not read it.
  if (std::uint64_t{decoder.layer.head_dim} * decoder.layer.num_heads != decoder.hidden_size) {
    return config.Unsupported("head_dim");
  }
  ATTN_ASSIGN_OR_RETURN(std::vector<LayerSpec> layers, ReadQwenLayers(config, decoder, 80));
  return DecoderModel(decoder, std::move(layers), true, false);
}

absl::StatusOr<FamilyModel> ReadQwen2VlModel(ConfigReader& config) {
  ATTN_ASSIGN_OR_RETURN(FamilyModel text, ReadText(config));
  text.self_attention[0].prefixes = {"model.", "model.language_model.", "language_model."};
  ATTN_ASSIGN_OR_RETURN(ConfigReader vision_config, config.RequiredObject("vision_config"));
  ATTN_ASSIGN_OR_RETURN(Tower vision, ReadVision(vision_config));
  ATTN_RETURN_IF_ERROR(RefuseUnreadAttention(vision_config));
  return TwoTowerModel({std::move(text.stacks[0]), std::move(text.self_attention[0])},
                       std::move(vision));
}

}  // namespace attn
