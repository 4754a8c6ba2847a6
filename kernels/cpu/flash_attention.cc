// Cuts a problem into tasks; the tasks themselves are flash_attention-inl.h.
#include "kernels/cpu/flash_attention.h"

#include "kernels/cpu/flash_scratch.h"
#include "kernels/cpu/isa.h"
#include "kernels/visible_keys.h"

namespace attn::kernels::cpu {
namespace {

// Tasks for each worker, so that the last ones to end leave little idle.
constexpr int64_t kTasksPerWorker = 8;
// What a task's rows (queries and outputs) may take. They are walked through once for each step of
// keys, and so may lie behind the second-level cache, which holds the step and a tile; the more of
// them, the less it costs to make a step's pages.
constexpr int64_t kRowsBytes = 3 << 19;
constexpr int64_t kMinRows = 2 * kFlashRowMultiple;
constexpr int64_t kTileRows = 24;
constexpr int64_t kTightRows = 12;
// Of a sparse task: few enough to want the same keys, enough to pay for packing and choosing them.
constexpr int64_t kSparseRows = 192;
constexpr int64_t kSummaryPages = 16;  // of a task
// One task in so many has a row computed in full, and more of few tasks: a sample of two says
// little.
constexpr int64_t kAuditedTasks = 16;
constexpr int64_t kFewestAudits = 16;
// The cost of reading a key, in rows that are multiplied with it.
constexpr int64_t kReadRows = 4;

constexpr int64_t kSegmentKeys = kFlashSegmentPages * kPageTokens;

int64_t DivideUp(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct Cut {
  const AttentionArgs& args;
  int64_t group;
  int64_t max_rows;
  int64_t target_cost;  // of a task; 0: keys are never cut
};

// One sequence's rows [first, first + count) of every KV head.
struct RowGroup {
  int64_t first_row = 0;
  int64_t num_rows = 0;
  int64_t first_segment = 0;
  int64_t end_segment = 0;
  int64_t cost = 0;
};

RowGroup GroupAt(const Cut& cut, const Sequence& sequence, int64_t first_row) {
  RowGroup rows;
  rows.first_row = first_row;
  const int64_t all = sequence.q_len * cut.group;
  rows.num_rows = all - first_row < cut.max_rows ? all - first_row : cut.max_rows;
  const KeyRange keys = VisibleToAny(cut.args, sequence, first_row / cut.group,
                                     (first_row + rows.num_rows - 1) / cut.group);
  rows.first_segment = keys.begin / kSegmentKeys;
  rows.end_segment = DivideUp(keys.end, kSegmentKeys);
  rows.cost = (rows.num_rows + kReadRows) * (keys.end - keys.begin);
  return rows;
}

// Calls visit(sequence, rows) for all groups of all sequences.
template <typename Visit>
void VisitGroups(const Cut& cut, Visit visit) {
  for (int64_t s = 0; s < cut.args.num_sequences; ++s) {
    const Sequence& sequence = cut.args.sequences[s];
    for (int64_t row = 0; row < sequence.q_len * cut.group; row += cut.max_rows) {
      visit(s, GroupAt(cut, sequence, row));
    }
  }
}

int64_t Parts(const Cut& cut, const RowGroup& rows) {
  const int64_t segments = rows.end_segment - rows.first_segment;
  const int64_t parts = cut.target_cost > 0 ? DivideUp(rows.cost, cut.target_cost) : 1;
  // Whoever is cut is cut by much: results that wait for a merge are not worth a small gain.
  if (parts < 2 || segments < 2 || rows.num_rows > kMinRows * 2) return 1;
  return parts < segments ? parts : segments;
}

// Rows that choose their keys together: a number that depends on nothing, so that a sequence's keys
// do not depend on its company.
int64_t RowsOfSparseTask(const AttentionArgs& args, int64_t group) {
  int64_t longest = 1;
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    const int64_t rows = args.sequences[s].q_len * group;
    if (rows > longest) longest = rows;
  }
  return longest < kSparseRows ? RoundUpTo(longest, kFlashRowMultiple) : kSparseRows;
}

// Rows of a task: what the cache holds, and fewer where that gives every worker enough to do.
int64_t RowsOfTask(const AttentionArgs& args, const FlashOptions& options, int64_t group) {
  const int64_t row_bytes = (args.head_dim + 2 * args.value_dim) * 4;
  int64_t most = options.max_rows > 0 ? options.max_rows : kRowsBytes / row_bytes;
  int64_t rows = 0;
  int64_t longest = 0;
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    const int64_t count = args.sequences[s].q_len * group;
    rows += count * args.num_kv_heads;
    if (count > longest) longest = count;
  }
  const int64_t enough = rows / (options.workers * kTasksPerWorker);
  if (enough < most) most = enough;
  if (most < kMinRows && options.max_rows == 0) most = kMinRows;
  if (most > longest) most = longest;
  // Even shares: a last task of few rows would read all keys for them.
  if (most > 0 && longest > most) most = DivideUp(longest, DivideUp(longest, most));
  return RoundUpTo(most > 0 ? most : 1, kFlashRowMultiple);
}

// Pages of the sequences before `end`, of all KV heads.
int64_t PagesBefore(const AttentionArgs& args, int64_t end) {
  int64_t pages = 0;
  for (int64_t s = 0; s < end; ++s) pages += DivideUp(args.sequences[s].kv_len, kPageTokens);
  return pages * args.num_kv_heads;
}

void PlanSparsity(const AttentionArgs& args, const FlashSparsity& sparsity, FlashPlan* plan) {
  plan->sparse = true;
  plan->sparsity = sparsity;
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    const int64_t pages = DivideUp(args.sequences[s].kv_len, kPageTokens);
    if (pages > plan->max_pages) plan->max_pages = pages;
    plan->summary_tasks += DivideUp(pages, kSummaryPages) * args.num_kv_heads;
  }
  if (plan->max_pages == 0) plan->max_pages = 1;
  plan->merges_inside = plan->max_pages > kFlashSegmentPages;
  plan->summary_bytes =
      static_cast<size_t>(PagesBefore(args, args.num_sequences) * SummaryFloats(args.head_dim) * 4);
}

}  // namespace

void PlanFlashSummaries(const AttentionArgs& args, FlashSummaryTask* tasks) noexcept {
  int64_t summary = 0;
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    const int64_t pages = DivideUp(args.sequences[s].kv_len, kPageTokens);
    for (int64_t head = 0; head < args.num_kv_heads; ++head) {
      for (int64_t page = 0; page < pages; page += kSummaryPages) {
        const int64_t end = page + kSummaryPages;
        *tasks++ = {static_cast<int32_t>(s), static_cast<int32_t>(head), page,
                    end < pages ? end : pages, summary};
      }
      summary += pages * SummaryFloats(args.head_dim);
    }
  }
}

FlashPlan PlanFlashAttention(const AttentionArgs& args, const FlashOptions& options,
                             FlashTask* tasks) noexcept {
  const int64_t group = args.num_kv_heads > 0 ? args.num_heads / args.num_kv_heads : 1;
  const int64_t rows = options.sparsity != nullptr ? RowsOfSparseTask(args, group)
                                                   : RowsOfTask(args, options, group);
  Cut cut = {args, group, rows, 0};
  int64_t cost = 0;
  VisitGroups(cut, [&](int64_t, const RowGroup& one) { cost += one.cost * args.num_kv_heads; });
  if (options.sparsity == nullptr) {
    cut.target_cost = DivideUp(cost, options.workers * kTasksPerWorker);
  }

  FlashPlan plan;
  if (options.sparsity != nullptr) PlanSparsity(args, *options.sparsity, &plan);
  plan.max_rows = cut.max_rows;
  plan.tight = options.tight;
  const int64_t tile = options.tight ? kTightRows : kTileRows;
  plan.tile_rows = cut.max_rows < tile ? cut.max_rows : tile;
  int64_t partials = 0;
  VisitGroups(cut, [&](int64_t, const RowGroup& one) {
    const int64_t parts = Parts(cut, one);
    plan.attend_tasks += parts * args.num_kv_heads;
    if (parts > 1) {
      plan.merge_tasks += args.num_kv_heads;
      partials += one.num_rows * (one.end_segment - one.first_segment) * args.num_kv_heads;
    } else if (one.end_segment - one.first_segment > 1) {
      plan.merges_inside = true;
    }
  });
  plan.partial_bytes = static_cast<size_t>(partials * FlashPartialStride(args.value_dim) * 4);
  plan.task_bytes = static_cast<size_t>(DivideFlashScratch(args, ScratchShapeOf(args, plan)).bytes);
  if (plan.sparse) {
    // A summary task has a page of keys, and one of float32.
    const PageLayout widened = {ElementType::kFloat32, args.head_dim, 0};
    const auto summary = static_cast<size_t>(2 * widened.value_offset() + kPageAlignment);
    if (plan.task_bytes < summary) plan.task_bytes = summary;
  }
  if (tasks == nullptr) return plan;

  int64_t audit_stride = plan.attend_tasks / kFewestAudits;
  if (audit_stride < 1) audit_stride = 1;
  if (audit_stride > kAuditedTasks) audit_stride = kAuditedTasks;
  int64_t attend = 0;
  int64_t merge = plan.attend_tasks;
  int64_t partial = 0;
  VisitGroups(cut, [&](int64_t s, const RowGroup& one) {
    const int64_t parts = Parts(cut, one);
    const int64_t segments = one.end_segment - one.first_segment;
    for (int64_t head = 0; head < args.num_kv_heads; ++head) {
      FlashTask task;
      task.sequence = static_cast<int32_t>(s);
      task.kv_head = static_cast<int32_t>(head);
      task.first_row = one.first_row;
      task.num_rows = one.num_rows;
      task.group_first_segment = one.first_segment;
      task.group_end_segment = one.end_segment;
      task.partial = parts > 1 ? partial : -1;
      task.cost = one.cost / parts;
      if (plan.sparse) {
        const int64_t pages = DivideUp(args.sequences[s].kv_len, kPageTokens);
        task.summary = (PagesBefore(args, s) + head * pages) * SummaryFloats(args.head_dim);
        task.audited = attend % audit_stride == audit_stride / 2;
      }
      for (int64_t part = 0; part < parts; ++part) {
        task.first_segment = one.first_segment + segments * part / parts;
        task.end_segment = one.first_segment + segments * (part + 1) / parts;
        tasks[attend++] = task;
      }
      if (parts == 1) continue;
      partial += one.num_rows * segments;
      task.first_segment = one.first_segment;
      tasks[merge++] = task;
    }
  });
  return plan;
}

void RunFlashTask(const AttentionArgs& args, const FlashPlan& plan, const FlashTask& task,
                  void* scratch, float* partials, const bool* cancelled,
                  FlashCounters* counters) noexcept {
  ActiveIsa().flash_attention(args, plan, task, scratch, partials, cancelled, counters);
}

FlashCounters CountFlashPairs(const AttentionArgs& args) noexcept {
  return ActiveIsa().count_flash_pairs(args);
}

void RunFlashSummaryTask(const AttentionArgs& args, const FlashPlan& plan,
                         const FlashSummaryTask& task, void* scratch) noexcept {
  ActiveIsa().summarize_keys(args, plan, task, scratch);
}

void MergeFlashTask(const AttentionArgs& args, const FlashTask& task, float* partials) noexcept {
  ActiveIsa().merge_flash(args, task, partials);
}

}  // namespace attn::kernels::cpu
