// `torch_sdpa`: LibTorch's scaled_dot_product_attention, the fused operator where LibTorch can use
// it. It is the peer that our own kernels are measured against, and what serves until they are
// faster. Its own memory is not in our hands: what it allocates is measured, WorkspaceBytes is an
// estimate.
#pragma once

#include "core/attention_implementation.h"

namespace attn {

ImplementationRow TorchSdpaAttentionRow();

}  // namespace attn
