// BERT (arXiv:1810.04805) as transformers' BertModel and BertFor... save it.
#pragma once

#include "absl/status/statusor.h"
#include "core/families/family.h"

namespace attn {

absl::StatusOr<FamilyModel> ReadBertModel(ConfigReader& config);

}  // namespace attn
