// What distinguishes one family of models from another when a directory is read: how its config
// shapes attention and what its tensors are called. A new family is a file in this folder, one row
// in families.cc and one CMake line.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/config_reader.h"
#include "core/model_spec.h"

namespace attn {

// Bounds for what any config may say, so that absurd values are refused before they cost anything.
inline constexpr std::uint32_t kMaxLayers = 4096;
inline constexpr std::uint32_t kMaxHeads = 65536;
inline constexpr std::uint32_t kMaxHeadDim = 65536;
inline constexpr std::uint32_t kMaxHiddenSize = 1u << 20;
inline constexpr std::uint32_t kMaxPositions = 1u << 30;

// One way in which checkpoints name a layer's projections. "{}" stands for the layer's number;
// ".weight" and ".bias" are appended. Query, key and value are three matrices, or one with their
// rows in this order: then query_key_value is set and the three are null.
struct ProjectionNames {
  const char* query = nullptr;
  const char* key = nullptr;
  const char* value = nullptr;
  const char* output = nullptr;
  const char* query_key_value = nullptr;
};

// Where a stack's self-attention, or its cross-attention, lies in a checkpoint. Prefixes and
// namings combine freely; the loader takes the combination that the file has, and refuses a file
// with several.
struct StackTensors {
  std::vector<const char*> prefixes;
  std::vector<ProjectionNames> namings;
  // Which projections have a bias. A file that has one which its config rules out is refused.
  bool query_bias = true;
  bool key_bias = true;
  bool value_bias = true;
  bool output_bias = true;
  // Whole names of tensors that some families have; null: none.
  const char* query_norm = nullptr;  // [head_dim]
  const char* key_norm = nullptr;    // [head_dim]
  float norm_epsilon = 1e-6f;
  float norm_offset = 0.0f;     // added to the norms' elements, as stored
  const char* sinks = nullptr;  // [num_heads]
};

struct FamilyModel {
  Modality modality = Modality::kUnspecified;
  std::vector<LayerStack> stacks;
  std::vector<StackTensors> self_attention;   // parallel to stacks
  std::vector<StackTensors> cross_attention;  // the same; empty: no stack has any
};

struct Family {
  const char* model_type;  // as config.json says it
  absl::StatusOr<FamilyModel> (*read)(ConfigReader& config);
};

// Reads the model with the row of its model_type, then refuses every field known to change some
// model's attention that the row did not read. An unknown model_type is UNIMPLEMENTED.
absl::StatusOr<FamilyModel> ReadFamilyModel(ConfigReader& config, std::span<const Family> families);

// The second half of that for an object inside the config, once a family has read it.
absl::Status RefuseUnreadAttention(const ConfigReader& object);

std::span<const Family> BuiltinFamilies();

}  // namespace attn
