// `memory_efficient`: flash's kernel cut for the least memory. It honours a budget in bytes
// (ExecutionContext::memory_budget) whatever the sequence's length: tiles are small, keys and
// values of plain tensors are copied one page of 64 at a time, keys are never split between tasks,
// and fewer threads run where the budget does not hold a tile for each.
//
// Choose it over flash where many executions share little memory (flash takes up to 2 MiB for each
// thread, this one some tens of KiB), or where head_dim is so large that flash's tiles are. The
// results are flash's, bit for bit; it takes longer, most of all for many queries against plain
// tensors, whose keys it copies again for every tile.
#pragma once

#include "core/attention_implementation.h"

namespace attn {

ImplementationRow MemoryEfficientAttentionRow();

}  // namespace attn
