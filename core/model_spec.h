// What a model's attention looks like, without its weights: the plain structs behind the API's
// ModelSpec. Fields and their meaning are those of proto/attention/v1/admin.proto and types.proto.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/sparsity.h"

namespace attn {

enum class Modality : std::uint8_t { kUnspecified, kLanguage, kVision, kMultimodal };

const char* ModalityName(Modality modality);  // "language"

enum class AttentionKind : std::uint8_t { kSelf, kCross };

// How queries see keys, besides a mask. Unset fields take the layer's value, then the default;
// "off" is a set value.
struct AttentionOptions {
  std::optional<double> scale;                     // default 1 / sqrt(head_dim)
  std::optional<bool> is_causal;                   // default false
  std::optional<std::int64_t> window_left;         // -1: off
  std::optional<std::int64_t> window_right;        // -1: off
  std::optional<double> soft_cap;                  // 0: off
  std::optional<std::vector<float>> alibi_slopes;  // one per query head; empty: off
  std::optional<std::vector<float>> sink_logits;   // one per query head; empty: off
};

// `request` over `layer`: each field that the request sets wins.
AttentionOptions Override(const AttentionOptions& layer, const AttentionOptions& request);

struct RotaryEmbedding {
  double theta = 0.0;
  std::uint32_t rotary_dim = 0;
  bool interleaved = false;
  std::string scaling;
  std::map<std::string, double> scaling_parameters;
  std::vector<double> short_factor;
  std::vector<double> long_factor;
  std::vector<std::uint32_t> axis_sections;
  bool frequencies_per_axis = false;
};

struct LayerSpec {
  std::uint32_t repeat = 1;  // layers in this run
  std::uint32_t num_heads = 0;
  std::uint32_t num_kv_heads = 0;
  std::uint32_t head_dim = 0;
  std::uint32_t value_dim = 0;
  AttentionOptions options;
  std::optional<RotaryEmbedding> rotary;
  std::uint32_t encoder_hidden_size = 0;
};

struct LayerStack {
  std::string name;
  Modality modality = Modality::kUnspecified;
  std::uint32_t hidden_size = 0;
  std::uint32_t max_positions = 0;  // 0: no limit
  std::vector<LayerSpec> self_attention;
  std::vector<LayerSpec> cross_attention;
};

struct ModelSpec {
  std::string name;
  Modality modality = Modality::kUnspecified;
  std::string weights;  // a directory under the model root; empty: attention only
  std::vector<LayerStack> stacks;
  DType dtype = DType::kUnspecified;
  DType cache_dtype = DType::kUnspecified;
  std::string implementation;  // empty: "auto"
  bool allow_approximate = false;
  std::uint32_t instances = 0;
  SparsityOptions sparsity;
};

}  // namespace attn
