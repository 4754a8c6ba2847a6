// The rotary embedding that a config.json describes, in its older spelling (rope_theta,
// rope_scaling) and in transformers 5's (rope_parameters).
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "core/config_reader.h"
#include "core/model_spec.h"

namespace attn {

// What a family's config class has where the file says nothing.
struct RotaryDefaults {
  double theta = 10000.0;
  std::uint32_t original_positions = 0;    // 0: max_position_embeddings
  bool partial = false;                    // whether the family's code reads partial_rotary_factor
  bool longrope_alone = false;             // its only scaling, by whatever name (Phi-3)
  const char* theta_field = "rope_theta";  // beside the object
  // Where kinds of layers have embeddings of their own: whose object of rope_parameters is read.
  const char* layer_type = nullptr;
  bool scaled = true;  // whether this kind is the one that an older file's rope_scaling is for
  // Frequencies by each axis of positions; empty: one axis, and no mrope_section is understood.
  std::span<const std::uint32_t> axis_sections = {};
};

// Half rotation over `head_dim` dimensions, or a part of them.
absl::StatusOr<RotaryEmbedding> ReadRotary(ConfigReader& config, std::uint32_t head_dim,
                                           const RotaryDefaults& defaults);

}  // namespace attn
