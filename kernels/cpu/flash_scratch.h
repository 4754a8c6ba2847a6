// How the scratch memory of one flash task is divided: shared by the code that plans and the texts
// that run. C headers only and always inlined, as page_layout.h.
#pragma once

#include "kernels/cpu/flash_attention.h"
#include "kernels/cpu/sparse_selection.h"
#include "kernels/page_layout.h"

namespace attn::kernels::cpu {

// Rows of a task come in multiples of it: whole register blocks of every instruction set.
constexpr int64_t kFlashRowMultiple = 12;
constexpr int64_t kSpareRows = 6;  // of packed queries: a block for the row that is audited
constexpr int64_t kFlashScoreStride =
    kFlashStepPages * kPageTokens + 16;  // floats, of a tile's rows

[[gnu::always_inline]] constexpr int64_t RoundUpTo(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Floats from one row of outputs to the next.
[[gnu::always_inline]] constexpr int64_t FlashOutputStride(int64_t value_dim) {
  return RoundUpTo(value_dim, 16);
}

// Floats of one row's partial result: its output, then its state.
[[gnu::always_inline]] constexpr int64_t FlashPartialStride(int64_t value_dim) {
  return FlashOutputStride(value_dim) + 16;
}

// Byte offsets of the parts.
struct FlashScratch {
  int64_t query = 0;      // packed in blocks, up to four bytes an element
  int64_t scores = 0;     // [tile_rows][kFlashScoreStride]
  int64_t output = 0;     // [rows][FlashOutputStride]: of the segment
  int64_t total = 0;      // the same, of the segments before it; only where a task merges
  int64_t product = 0;    // the same, of the step; of a tile
  int64_t states = 0;     // [rows] of the segment, then [rows] of the segments before it
  int64_t ranges = 0;     // [rows] visible keys, then those of blocks of rows
  int64_t pages = 0;      // of one step; only where keys are not paged
  int64_t list = 0;       // [max_pages] the pages that a sparse task keeps
  int64_t selection = 0;  // queries [rows][head_dim], then the selection's own
  int64_t bytes = 0;
};

struct FlashScratchShape {
  int64_t rows = 0;
  int64_t tile_rows = 0;
  bool merges_inside = false;
  bool packs = false;  // pages
  bool tight = false;
  int64_t sparse_pages = 0;  // of the longest sequence; 0: not sparse
};

[[gnu::always_inline]] inline FlashScratchShape ScratchShapeOf(const AttentionArgs& args,
                                                               const FlashPlan& plan) {
  return {plan.max_rows, plan.tile_rows, plan.merges_inside,
          !args.paged,   plan.tight,     plan.sparse ? plan.max_pages : 0};
}

[[gnu::always_inline]] constexpr FlashScratch DivideFlashScratch(const AttentionArgs& args,
                                                                 const FlashScratchShape& shape) {
  const int64_t out_bytes = FlashOutputStride(args.value_dim) * 4;
  const int64_t head_dim = RoundUpTo(args.head_dim, 4);
  const PageLayout page = {ElementType::kFloat32, head_dim, args.value_dim};
  const int64_t keys = page.value_offset();
  const int64_t values = page.page_bytes() - keys;
  FlashScratch parts;
  parts.scores = RoundUpTo((shape.rows + kSpareRows) * head_dim * 4, 64);
  parts.output = parts.scores + RoundUpTo(shape.tile_rows * kFlashScoreStride * 4, 64);
  parts.total = parts.output + shape.rows * out_bytes;
  parts.product = parts.total + (shape.merges_inside ? shape.rows * out_bytes : 0);
  parts.states = parts.product + shape.tile_rows * out_bytes;
  parts.ranges = parts.states + RoundUpTo(shape.rows * 16, 64);
  parts.pages = parts.ranges + RoundUpTo(shape.rows * 16 + shape.rows / 4 * 40, 64);
  const int64_t packed =
      shape.tight ? (keys > values ? keys : values) : kFlashStepPages * (keys + values);
  parts.list = parts.pages + (shape.packs ? packed : 0);
  parts.selection = parts.list + RoundUpTo(shape.sparse_pages * 4, 64);
  parts.bytes = parts.selection;
  if (shape.sparse_pages > 0) {
    parts.bytes += RoundUpTo(shape.rows * args.head_dim * 4, 64) +
                   RoundUpTo(SelectionScratchBytes(shape.rows, args.num_heads / args.num_kv_heads,
                                                   args.head_dim, shape.sparse_pages),
                             64);
  }
  return parts;
}

// Every sparse task keeps the first page, and the pages within this many keys of its rows.
constexpr int64_t kSinkPages = 1;
constexpr int64_t kLocalKeys = 128;

// What a sparse task selects from, but for its rows' queries and ranges.
[[gnu::always_inline]] inline void SetSelection(const AttentionArgs& args, const FlashPlan& plan,
                                                const FlashTask& task, SelectionTask* selection) {
  const Sequence& sequence = args.sequences[task.sequence];
  selection->first_row = task.first_row;
  selection->rows = task.num_rows;
  selection->group = args.num_heads / args.num_kv_heads;
  selection->first_position = sequence.first_query_position;
  selection->head_dim = args.head_dim;
  selection->kv_len = sequence.kv_len;
  selection->scale = args.scale;
  selection->soft_cap = args.soft_cap;
  if (args.alibi_slopes != nullptr) {
    selection->alibi_slopes = args.alibi_slopes + task.kv_head * selection->group;
  }
  selection->summaries = plan.summaries + task.summary;
  selection->summary_stride = SummaryFloats(args.head_dim);
  selection->sink_pages = kSinkPages;
  selection->local_keys = kLocalKeys;
  selection->factor = plan.sparsity.factor;
  selection->mass = plan.sparsity.mass;
}

}  // namespace attn::kernels::cpu
