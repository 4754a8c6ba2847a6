// Qwen2-VL (arXiv:2409.12191) as transformers' Qwen2VLForConditionalGeneration, Qwen2VLModel,
// Qwen2VLTextModel and their kin save it: Qwen2 with rotary embedding by time, height and width,
// and an encoder of patches with rotary embedding by height and width.
//
// position_ids are those of the library: [3, batch, q_len] of the text, [2, patches] of the images.
// Patches of all images come end to end, each frame a row of query_lengths.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadQwen2VlModel(ConfigReader& config);
absl::StatusOr<FamilyModel> ReadQwen2VlTextModel(ConfigReader& config);

}  // namespace attn
