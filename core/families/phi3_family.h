// Phi-3 (arXiv:2404.14219) as transformers' Phi3Model and Phi3For... save it: one matrix for query,
// key and value, LongRoPE, rotary embedding of a part of each head.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadPhi3Model(ConfigReader& config);

}  // namespace attn
