// How the standard kernel divides a task's memory and which keys its rows take: shared by the code
// that plans and counts and the text that runs. C headers only and always inlined, as
// page_layout.h.
#pragma once

#include "kernels/page_layout.h"
#include "kernels/visible_keys.h"

namespace attn::kernels::cpu {

// Rows that take the same keys: whole register blocks of every instruction set.
constexpr int64_t kStandardGroupRows = 12;
// Fewer queries are multiplied with keys and values where they lie: packing costs more than it
// saves.
constexpr int64_t kStandardFewRows = 6;
constexpr int64_t kStandardStepPages = 4;  // of keys or values that are packed at a time

[[gnu::always_inline]] constexpr int64_t RoundUpToPanel(int64_t value) {
  return (value + kPanelWidth - 1) / kPanelWidth * kPanelWidth;
}

// Floats from one row of scores to the next: lines of their own, no power of two apart.
constexpr int64_t kStandardRowRoom = 2 * kPanelWidth;
[[gnu::always_inline]] constexpr int64_t StandardScoreStride(int64_t kv_len) {
  return RoundUpToPanel(kv_len) + kPanelWidth;
}

// Offsets of the parts, in floats; each begins on a line of its own.
struct StandardScratch {
  int64_t step = 0;     // pages of float32 keys, later of values
  int64_t query = 0;    // blocks of rows, interleaved; few rows: [q_len][head_dim]
  int64_t output = 0;   // [q_len][value_dim], rows padded to whole panels
  int64_t factors = 0;  // [q_len] what rows of the output are to be multiplied with
  int64_t scores = 0;   // [q_len][StandardScoreStride]
};

[[gnu::always_inline]] constexpr StandardScratch DivideStandardScratch(int64_t q_len,
                                                                       int64_t head_dim,
                                                                       int64_t value_dim) {
  const int64_t columns = RoundUpToPanel(value_dim);
  const int64_t width = head_dim > columns ? head_dim : columns;
  const int64_t rows = (q_len + kStandardGroupRows - 1) / kStandardGroupRows * kStandardGroupRows;
  StandardScratch parts;
  parts.query = q_len < kStandardFewRows ? 0 : kStandardStepPages * kPageTokens * width;
  parts.output = parts.query + RoundUpToPanel(rows * head_dim);
  parts.factors = parts.output + (q_len < kStandardFewRows ? 0 : q_len * columns);
  parts.scores = parts.factors + RoundUpToPanel(q_len);
  return parts;
}

// The weights that are asked for are those before masks: then every score is formed.
[[gnu::always_inline]] inline bool WantsHiddenScores(const AttentionArgs& args,
                                                     const Sequence& sequence) {
  return sequence.weights != nullptr &&
         (args.stage == ScoreStage::kScaled || args.stage == ScoreStage::kSoftCapped);
}

// The keys that any row of the group that begins at `first` sees by position.
[[gnu::always_inline]] inline KeyRange GroupKeys(const AttentionArgs& args,
                                                 const Sequence& sequence, int64_t first) {
  const int64_t end = first + kStandardGroupRows;
  return VisibleToAny(args, sequence, first, (end < sequence.q_len ? end : sequence.q_len) - 1);
}

// Those that it has scores for: whole panels where keys are packed.
[[gnu::always_inline]] inline KeyRange ScoredKeys(const AttentionArgs& args,
                                                  const Sequence& sequence, int64_t first) {
  KeyRange keys = GroupKeys(args, sequence, first);
  if (WantsHiddenScores(args, sequence)) keys = {0, sequence.kv_len};
  if (sequence.q_len < kStandardFewRows) return keys;
  return {keys.begin / kPanelWidth * kPanelWidth, RoundUpToPanel(keys.end)};
}

}  // namespace attn::kernels::cpu
