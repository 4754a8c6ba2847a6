// Which pages of keys a block of rows attends to when it may not attend to all of them: a page's
// weight is estimated from a summary of its 64 keys, made once, and the heaviest are kept. The
// texts are page_summary-inl.h, page_weights-inl.h and sparse_selection-inl.h. C headers only and
// always inlined, as page_layout.h.
#pragma once

#include "kernels/page_layout.h"
#include "kernels/visible_keys.h"

namespace attn::kernels::cpu {

// A page's summary, [head_dim][4]: the means of the page's two halves without its outliers, then
// the outliers: the longest key, and the one farthest from the page's mean. Behind them, how many
// keys each of the four stands for, [4], and the spread of either half, [2]. Outliers are kept
// apart because attention is the exponential of a score: a few keys are most of a page's weight,
// and a mean hides them.
constexpr int64_t kSummaryMeans = 2;
constexpr int64_t kSummaryOutliers = 2;
constexpr int64_t kSummaryVectors = kSummaryMeans + kSummaryOutliers;

// Floats of a summary, the same for every instruction set; whole cache lines.
[[gnu::always_inline]] constexpr int64_t SummaryFloats(int64_t head_dim) {
  return (kSummaryVectors * head_dim + kSummaryVectors + kSummaryMeans + 15) / 16 * 16;
}

// A page's bounds, the least and the greatest of its keys in each dimension: [head_dim][2]. Half
// of a summary, and they can grow with the page, key by key, but they rank worse.
constexpr int64_t kBoundVectors = 2;
[[gnu::always_inline]] constexpr int64_t BoundFloats(int64_t head_dim) {
  return kBoundVectors * head_dim;
}

// Rows [first_row, first_row + rows) of one KV head of one sequence: row r is position r / group of
// the group's head r % group, and position i stands at first_position + i among the keys.
struct SelectionTask {
  const float* queries = nullptr;  // [rows][head_dim], rows query_stride floats apart
  int64_t query_stride = 0;
  const KeyRange* ranges = nullptr;  // [rows]: the keys that each row sees, empty where none
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t group = 1;
  int64_t first_position = 0;
  int64_t head_dim = 0;
  int64_t kv_len = 0;
  float scale = 1.0f;                   // score = scale * q . k, then soft cap, then ALiBi's bias,
  float soft_cap = 0.0f;                // as AttentionArgs has them. Masks of elements are not
  const float* alibi_slopes = nullptr;  // looked at. Slopes: [group], or null.
  const float* summaries = nullptr;     // page p's summary (or bounds) at p * summary_stride
  int64_t summary_stride = 0;           // floats
  // Kept whatever they weigh, where any row sees them: the first sink_pages pages of the sequence,
  // and pages with a key at most local_keys away from a row's own position (0: the diagonal).
  int64_t sink_pages = 1;
  int64_t local_keys = 128;
  // Pages are kept from the heaviest down until the pairs that are computed come nearest to
  // (1 - factor) of the visible (query, key) pairs; or, where mass > 0, until the kept pages'
  // estimated share of the attention, a mean over rows, reaches `mass`. factor 0 and mass >= 1 keep
  // every visible page.
  double factor = 0.0;
  double mass = 0.0;
};

struct SelectionResult {
  int64_t pages = 0;
  int64_t kept_pairs = 0;     // visible (query, key) pairs in the kept pages
  int64_t visible_pairs = 0;  // in all pages
  // The share of the attention that the kept pages are estimated to hold, 0 to 1; 1 where every
  // page was kept or no row sees anything.
  float estimated_mass = 1.0f;
};

// The pages that hold any key in any row's range: [begin, end), both 0 where there are none.
[[gnu::always_inline]] inline KeyRange SelectablePages(const SelectionTask& task) {
  KeyRange all;
  for (int64_t i = 0; i < task.rows; ++i) {
    const KeyRange& keys = task.ranges[i];
    if (keys.begin >= keys.end) continue;
    if (all.begin == all.end) all = keys;
    if (keys.begin < all.begin) all.begin = keys.begin;
    if (keys.end > all.end) all.end = keys.end;
  }
  return {all.begin / kPageTokens, (all.end + kPageTokens - 1) / kPageTokens};
}

// Rows of one head that stand side by side are pooled into lanes of up to 16 positions: lanes are
// whole vectors, and as many as fill them.
constexpr int64_t kPooledPositions = 16;
constexpr int64_t kWidestVector = 16;  // lanes, of any instruction set

[[gnu::always_inline]] constexpr int64_t SelectionLanes(int64_t positions, int64_t group,
                                                        int64_t vector) {
  const int64_t parts = (positions + kPooledPositions - 1) / kPooledPositions;
  return (parts * group + vector - 1) / vector * vector;
}

// Byte offsets into the scratch memory of one selection of at most `rows` rows and `pages` pages.
struct SelectionScratch {
  int64_t pooled = 0;     // [lanes][head_dim]
  int64_t query = 0;      // [2 head_dim][lanes]
  int64_t lanes = 0;      // a few numbers for each
  int64_t row_lanes = 0;  // [rows]
  int64_t tops = 0;       // [pages][lanes]
  int64_t sums = 0;       // [pages][lanes]
  int64_t estimates = 0;  // [pages]
  int64_t pairs = 0;      // [pages]
  int64_t heap = 0;       // [pages]
  int64_t kept = 0;       // [pages]
  int64_t bytes = 0;
};
constexpr int64_t kLaneNumbers = 6;

[[gnu::always_inline]] constexpr SelectionScratch DivideSelectionScratch(int64_t rows,
                                                                         int64_t group,
                                                                         int64_t head_dim,
                                                                         int64_t pages) {
  const int64_t positions = (rows + group - 1) / group + 1;
  const int64_t lanes = SelectionLanes(positions, group, kWidestVector);
  const int64_t page_floats = (pages + 15) / 16 * 16;
  SelectionScratch parts;
  parts.query = lanes * head_dim * 4;
  parts.lanes = parts.query + 2 * lanes * head_dim * 4;
  parts.row_lanes = parts.lanes + kLaneNumbers * lanes * 4;
  parts.tops = parts.row_lanes + (rows + 15) / 16 * 64;
  parts.sums = parts.tops + pages * lanes * 4;
  parts.estimates = parts.sums + pages * lanes * 4;
  parts.pairs = parts.estimates + page_floats * 4;
  parts.heap = parts.pairs + page_floats * 4;
  parts.kept = parts.heap + page_floats * 4;
  parts.bytes = parts.kept + page_floats;
  return parts;
}

// Bytes that SelectPages needs: of 128 rows about 140 for each page; aligned to 64 when handed out.
[[gnu::always_inline]] constexpr int64_t SelectionScratchBytes(int64_t rows, int64_t group,
                                                               int64_t head_dim, int64_t pages) {
  return DivideSelectionScratch(rows, group, head_dim, pages).bytes;
}

}  // namespace attn::kernels::cpu
