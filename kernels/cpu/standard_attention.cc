#include "kernels/cpu/standard_attention.h"

#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa_units.h"
#include "kernels/cpu/standard_scratch.h"

namespace attn::kernels::cpu {

size_t StandardAttentionTaskBytes(int64_t q_len, int64_t pairs, int64_t head_dim,
                                  int64_t value_dim) noexcept {
  const StandardScratch parts = DivideStandardScratch(q_len, head_dim, value_dim);
  return static_cast<size_t>(parts.scores + pairs + q_len * kStandardRowRoom) * sizeof(float);
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
  plan.task_workspace_bytes =
      StandardAttentionTaskBytes(q_len, pairs, args.head_dim, args.value_dim);
  return plan;
}

StandardPairs CountStandardPairs(const AttentionArgs& args) noexcept {
  StandardPairs pairs;
  for (int64_t i = 0; i < args.num_sequences; ++i) {
    const Sequence& sequence = args.sequences[i];
    for (int64_t first = 0; first < sequence.q_len; first += kStandardGroupRows) {
      const int64_t left = sequence.q_len - first;
      const int64_t rows = left < kStandardGroupRows ? left : kStandardGroupRows;
      const KeyRange scored = ScoredKeys(args, sequence, first);
      const KeyRange weighed = GroupKeys(args, sequence, first);
      pairs.scored += rows * (scored.end - scored.begin);
      pairs.weighed += rows * (weighed.end - weighed.begin);
    }
  }
  return pairs;
}

void RunStandardAttention(const AttentionArgs& args, int64_t task, void* workspace,
                          const bool* cancelled) noexcept {
  ActiveIsa().standard_attention(args, task, workspace, cancelled);
}

}  // namespace attn::kernels::cpu
