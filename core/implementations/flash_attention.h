// `flash`: tiles of queries against pages of keys with an online softmax
// (kernels/cpu/flash_attention.h). Memory grows with the rows that run at once, not with their
// keys; caches' pages are read in place. Everything but the attention weights, which it never
// holds.
#pragma once

#include "core/attention_implementation.h"

namespace attn {

ImplementationRow FlashAttentionRow();

}  // namespace attn
