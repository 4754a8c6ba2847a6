// gpt-oss (arXiv:2508.10925) as transformers' GptOssModel and GptOssFor... save it: a sink for
// every head of every layer, windows on every other layer, YaRN.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadGptOssModel(ConfigReader& config);

}  // namespace attn
