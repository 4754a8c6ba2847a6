// What flash, memory_efficient and sparse have in common: the tiled kernel of
// kernels/cpu/flash_attention.h, its workspace and its tasks on the executor.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "core/attention_implementation.h"
#include "kernels/cpu/flash_attention.h"

namespace attn {

// Runs all tasks. `counters`: what they did, all of them together. RESOURCE_EXHAUSTED.
absl::Status RunTiledAttention(const kernels::AttentionArgs& args,
                               const kernels::cpu::FlashOptions& options, ExecutionContext& context,
                               kernels::cpu::FlashCounters& counters);

// What it takes of the workspace.
std::uint64_t TiledAttentionBytes(const kernels::AttentionArgs& args,
                                  const kernels::cpu::FlashOptions& options);

// The operations that it counts.
ComputeComplexity TiledAttentionComplexity(const AttentionShape& shape);

// FAILED_PRECONDITION for what tiles can't do, in the name of `name`.
absl::Status SupportsTiles(const AttentionShape& shape, const char* name);

}  // namespace attn
