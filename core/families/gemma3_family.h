// Gemma 3 (arXiv:2503.19786) as transformers' Gemma3ForCausalLM, Gemma3TextModel,
// Gemma3ForConditionalGeneration and their kin save it: queries and keys normalised per head,
// sliding layers with a rotary embedding of their own, SigLIP's encoder for images.
//
// In prompts with images, the tokens of one image see each other. No option says so: such a request
// overrides is_causal with false and brings a mask that lets each query see what comes before it
// and its own image; sliding layers keep their window. Models that are bidirectional for text too
// (EmbeddingGemma) need no mask.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadGemma3Model(ConfigReader& config);
absl::StatusOr<FamilyModel> ReadGemma3TextModel(ConfigReader& config);

}  // namespace attn
