// Whether what a caller says about a model is what its directory says.
#pragma once

#include "absl/status/status.h"
#include "core/model_spec.h"

namespace attn {

// Every field of `asked` that describes the architecture (modality, stacks) and is set must equal
// that of `found`: otherwise INVALID_ARGUMENT with the field, both values and the rule. Layers are
// compared one by one, however each side groups them into runs. An option that `found` leaves unset
// has its default.
absl::Status CheckAgreement(const ModelSpec& asked, const ModelSpec& found);

}  // namespace attn
