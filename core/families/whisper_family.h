// Whisper (arXiv:2212.04356) as transformers' WhisperModel and WhisperForConditionalGeneration save
// it: an audio encoder whose layers are bidirectional, and a decoder whose layers have causal
// self-attention and cross-attention to the encoder's output.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadWhisperModel(ConfigReader& config);

}  // namespace attn
