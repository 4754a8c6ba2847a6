// `standard`: the whole score matrix is formed, then normalised (kernels/cpu/standard_attention.h).
// It can do everything that a request can ask for; choose it for the weights and as the yardstick.
#pragma once

#include "core/attention_implementation.h"

namespace attn {

ImplementationRow StandardAttentionRow();

}  // namespace attn
