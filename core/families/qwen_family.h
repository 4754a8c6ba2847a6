// Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388) as transformers' Qwen2Model, Qwen3Model and
// their ...For... save them.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "core/families/causal_decoder.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadQwen2Model(ConfigReader& config);
absl::StatusOr<FamilyModel> ReadQwen3Model(ConfigReader& config);

// Layers from max_window_layers (`first_sliding` where the file says nothing) on slide, where
// use_sliding_window says so and layer_types nothing else.
absl::StatusOr<std::vector<LayerSpec>> ReadQwenLayers(ConfigReader& config,
                                                      const CausalDecoder& decoder,
                                                      std::uint32_t first_sliding);

}  // namespace attn
