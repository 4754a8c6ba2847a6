// FlashAttention-2 (arXiv:2307.08691, section 3.1) for prefill and decode alike: tiles of queries
// against pages of 64 keys with an online softmax, so that no score outlives its tile. Query heads
// that share keys are rows of the same tile: keys and values are read once per KV head. Where rows
// are few, keys are cut into segments, whose results are merged by their log-sum-exp
// (Flash-Decoding).
//
// A row's bits do not depend on how the work is cut, nor on the rows beside it: all tiles take keys
// in steps of 256 and segments of 2,048 from position 0, every row decides by itself when it is
// rescaled, and every dot product runs in the order of its index.
//
// The workspace of a task holds its rows (query, output, a tile of scores) and, where keys do not
// lie in pages yet, the pages of one step: it does not grow with the sequence.
#pragma once

#include "kernels/attention_args.h"

namespace attn::kernels::cpu {

constexpr int64_t kFlashStepPages = 4;      // between two looks at the rows' maxima
constexpr int64_t kFlashSegmentPages = 32;  // summed alone, then merged in order

// What a sparse execution leaves out: pages of 64 keys, task by task
// (kernels/cpu/sparse_selection.h).
struct FlashSparsity {
  double factor = 0.0;  // share of the visible query-key pairs to leave out, in [0, 1)
  double mass = 0.0;    // > 0: instead, the estimated share of the attention to keep
};

// How the work is cut: none of it changes a bit of the result.
struct FlashOptions {
  int64_t workers = 1;   // tasks that run at once
  int64_t max_rows = 0;  // of a task; 0: what the second-level cache holds
  // Keys and values are copied into pages one page at a time instead of one step at a time, and
  // tiles are small: memory first.
  bool tight = false;
  const FlashSparsity* sparsity = nullptr;  // null: all keys
};

// Rows [first_row, first_row + num_rows) of a KV head, where row r is position r / group of query
// head kv_head * group + r % group, against the pages of the segments [first_segment,
// end_segment). `partial`: where the results of its group's rows begin, one for each row and
// segment of [group_first_segment, group_end_segment); -1: the task writes the output.
struct FlashTask {
  int32_t sequence = 0;
  int32_t kv_head = 0;
  int64_t first_row = 0;
  int64_t num_rows = 0;
  int64_t first_segment = 0;
  int64_t end_segment = 0;
  int64_t group_first_segment = 0;
  int64_t group_end_segment = 0;
  int64_t partial = -1;
  int64_t cost = 0;      // multiply-adds, about: run the costly ones first
  int64_t summary = -1;  // of a sparse execution: where the summaries of its KV head's keys begin
  bool audited = false;  // one of its rows is computed in full, too
};

// Summarises the pages [first_page, end_page) of one KV head.
struct FlashSummaryTask {
  int32_t sequence = 0;
  int32_t kv_head = 0;
  int64_t first_page = 0;
  int64_t end_page = 0;
  int64_t summary = 0;  // of page 0
};

// summary_tasks (sparse ones alone), then attend_tasks tasks, then merge_tasks tasks: each kind
// when all of the one before are done.
struct FlashPlan {
  int64_t summary_tasks = 0;
  int64_t attend_tasks = 0;
  int64_t merge_tasks = 0;
  int64_t max_rows = 0;        // of a task
  int64_t tile_rows = 0;       // of a tile of scores
  bool merges_inside = false;  // some task walks over several segments
  bool tight = false;
  bool sparse = false;
  FlashSparsity sparsity;
  int64_t max_pages = 0;       // of a sequence
  size_t summary_bytes = 0;    // of all KV heads' keys
  float* summaries = nullptr;  // set by the caller: plan.summary_bytes
  size_t task_bytes = 0;       // scratch of one running task; 64-byte aligned when handed out
  size_t partial_bytes = 0;    // of all results that wait for their merge
};

// What the tasks did; every task has its own, the caller adds them up.
struct FlashCounters {
  int64_t score_pairs =
      0;  // query-key pairs whose scores were computed, hidden ones of a tile included
  int64_t value_pairs = 0;  // and that were multiplied with values
  // Of a sparse execution: pairs that masks of position leave visible, those of them in pages that
  // were kept, and the share of the attention that audited rows kept.
  int64_t visible_pairs = 0;
  int64_t kept_pairs = 0;
  int64_t audited_rows = 0;
  double audited_mass = 0.0;  // sum over the rows
};

// Fills `tasks` (null: only counts), attend tasks first. Never fails.
FlashPlan PlanFlashAttention(const AttentionArgs& args, const FlashOptions& options,
                             FlashTask* tasks) noexcept;
void PlanFlashSummaries(const AttentionArgs& args, FlashSummaryTask* tasks) noexcept;

// Computes one attend task, or merges one group. Tasks may run at the same time on different
// threads, each with a scratch of its own (plan.task_bytes, uninitialised). `cancelled`, read
// atomically between tiles, makes it return early with its output undefined; null: not cancellable.
void RunFlashTask(const AttentionArgs& args, const FlashPlan& plan, const FlashTask& task,
                  void* scratch, float* partials, const bool* cancelled,
                  FlashCounters* counters) noexcept;
void MergeFlashTask(const AttentionArgs& args, const FlashTask& task, float* partials) noexcept;

// What all tasks of an execution that leaves nothing out will count, from the lengths alone.
FlashCounters CountFlashPairs(const AttentionArgs& args) noexcept;

// Before the attend tasks of a sparse execution.
void RunFlashSummaryTask(const AttentionArgs& args, const FlashPlan& plan,
                         const FlashSummaryTask& task, void* scratch) noexcept;

}  // namespace attn::kernels::cpu
