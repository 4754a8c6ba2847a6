// Attention as the papers write it: one head's whole score matrix is formed, then normalised, then
// multiplied with the values. Workspace per running task: q_len * kv_len floats and a little, so
// O(n^2). It can return the weights at every stage and has every option of AttentionArgs, and it is
// the yardstick that the other implementations are measured with.
#pragma once

#include "kernels/attention_args.h"

namespace attn::kernels::cpu {

// Workspace of one task: scores of `pairs` query-key pairs with a vector's room at each row's end,
// the queries and outputs in float32, and one step of packed keys or values. With rows of differing
// lengths: of the longest q_len, and of the most pairs.
size_t StandardAttentionTaskBytes(int64_t q_len, int64_t pairs, int64_t head_dim,
                                  int64_t value_dim) noexcept;

// A task is one head of one sequence. Never fails.
TaskPlan PlanStandardAttention(const AttentionArgs& args) noexcept;

// Query-key pairs of one head, of all sequences, whose scores are formed, and that weigh values.
// Scores come in whole panels of keys; keys that position hides from all rows of a group have none,
// unless a stage of the weights before the mask is asked for. What a mask hides is counted.
struct StandardPairs {
  int64_t scored = 0;
  int64_t weighed = 0;
};
StandardPairs CountStandardPairs(const AttentionArgs& args) noexcept;

// Computes one task; tasks may run at the same time on different threads, each with a workspace of
// its own (plan.task_workspace_bytes, uninitialised). `cancelled`, read atomically between blocks
// of rows and keys, makes it return early with its output undefined; null: not cancellable.
void RunStandardAttention(const AttentionArgs& args, int64_t task, void* workspace,
                          const bool* cancelled) noexcept;

}  // namespace attn::kernels::cpu
