// A problem made of parts of another one, whose keys, values and results it shares: some of its
// sequences in any order, some rows of each, some of its KV heads with their query heads. What a
// batch-invariant kernel computes for a part has the bits that it has in the whole.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention_args.h"

namespace attn::reference {

struct ProblemPart {
  int64_t sequence = 0;
  int64_t first_row = 0;
  int64_t num_rows = 0;
  // Keys from here on are not there yet, as when a chunk of queries meets the cache that its own
  // tokens were just appended to; -1: all are there.
  int64_t kv_len = -1;
};

class ProblemParts {
 public:
  ProblemParts(const kernels::AttentionArgs& whole, const std::vector<ProblemPart>& parts);
  // With the query heads of the KV heads [first_kv_head, end_kv_head) alone.
  ProblemParts(const kernels::AttentionArgs& whole, const std::vector<ProblemPart>& parts,
               int64_t first_kv_head, int64_t end_kv_head);
  ProblemParts(const ProblemParts&) = delete;
  ProblemParts& operator=(const ProblemParts&) = delete;

  const kernels::AttentionArgs& args() const { return args_; }

 private:
  void AddPart(const kernels::AttentionArgs& whole, const ProblemPart& part, int64_t kv_head);

  kernels::AttentionArgs args_;
  std::vector<kernels::Sequence> sequences_;
  std::vector<std::vector<kernels::KeyValueSpan>> spans_;
  std::vector<std::vector<const void*>> blocks_;
};

// All rows of a sequence.
ProblemPart WholeSequence(const kernels::AttentionArgs& args, int64_t sequence);

// The rows of a sequence in consecutive chunks. Where attention is causal, a chunk's keys end with
// the last one that it sees.
std::vector<ProblemPart> ChunksOf(const kernels::AttentionArgs& args, int64_t sequence,
                                  int64_t rows);

}  // namespace attn::reference
