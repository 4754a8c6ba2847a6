#include "kernels/cpu/standard_attention.h"

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa_units.h"

namespace attn::kernels::cpu {

size_t StandardAttentionTaskBytes(int64_t q_len, int64_t pairs, int64_t head_dim) noexcept {
  const int64_t scores = pairs + q_len * kMaxPanelKeys;
  const int64_t operands = (q_len + kMaxPanelKeys) * head_dim;
  return static_cast<size_t>(scores + operands) * sizeof(float);
}

TaskPlan PlanStandardAttention(const AttentionArgs& args) noexcept {
  TaskPlan plan;
  plan.num_tasks = args.num_sequences * args.num_heads;
  int64_t q_len = 0;
  int64_t pairs = 0;
  for (int64_t i = 0; i < args.num_sequences; ++i) {
    const Sequence& sequence = args.sequences[i];
    if (sequence.q_len > q_len) q_len = sequence.q_len;
    if (sequence.q_len * sequence.kv_len > pairs) pairs = sequence.q_len * sequence.kv_len;
  }
  plan.task_workspace_bytes = StandardAttentionTaskBytes(q_len, pairs, args.head_dim);
  return plan;
}

void RunStandardAttention(const AttentionArgs& args, int64_t task, void* workspace,
                          const bool* cancelled) noexcept {
  ActiveIsa().standard_attention(args, task, workspace, cancelled);
}

}  // namespace attn::kernels::cpu
