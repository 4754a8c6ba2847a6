// Seeded random attention problems that own their memory. Everything around and between rows is
// NaN, so that a kernel that reads what it must not shows it, and what was written there is found.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/attention_args.h"

namespace attn::reference {

// How rows of heads lie: [batch, head, row, dim], [batch, row, head, dim], or tokens-first with the
// sequences end to end.
enum class Layout { kHeadsFirst, kTokensFirst, kPacked };

struct ProblemCase {
  int64_t batch = 1;
  int64_t heads = 1;
  int64_t kv_heads = 1;
  int64_t q_len = 1;
  int64_t kv_len = 1;
  int64_t head_dim = 16;
  int64_t value_dim = 0;  // 0: head_dim
  kernels::ElementType dtype = kernels::ElementType::kFloat32;
  kernels::ElementType output_dtype = kernels::ElementType::kFloat32;
  bool causal = false;
  int64_t window_left = -1;
  int64_t window_right = -1;
  float soft_cap = 0;
  bool alibi = false;
  bool sinks = false;
  kernels::MaskType mask = kernels::MaskType::kNone;
  int mask_rank =
      4;  // 1: [key], 2: [query, key], 3: [head, query, key], 4: [batch, head, query, key]
  int64_t mask_extent = -1;           // keys that the mask covers; -1: all
  bool mask_broadcasts_keys = false;  // one element for all keys of a row
  int64_t spans = 1;
  bool ragged = false;  // the first sequence has q_len and kv_len, the others fewer, down to none
  std::optional<int64_t> first_query_position;  // default: the queries are the last keys
  Layout layout = Layout::kTokensFirst;
  kernels::ScoreStage stage = kernels::ScoreStage::kNone;
  bool lse = false;
  double logit_magnitude = 1;    // standard deviation of the scores
  bool misaligned = false;       // buffers begin one element past a 64-byte boundary
  bool hidden_keys_nan = false;  // keys and values that no row sees are NaN
  int64_t nan_key = -1;          // this key and its value are NaN, whoever sees it
  int64_t infinite_value = -1;   // this key's value is infinite
  uint32_t seed = 1;
};

// For example b2_h8_kv2_q37_k129_d80_causal: sizes, then what differs from the defaults.
std::string CaseName(const ProblemCase& c);
void PrintTo(const ProblemCase& c, std::ostream* out);  // for gtest

class AttentionProblem {
 public:
  explicit AttentionProblem(const ProblemCase& c);
  ~AttentionProblem();
  AttentionProblem(const AttentionProblem&) = delete;
  AttentionProblem& operator=(const AttentionProblem&) = delete;

  const kernels::AttentionArgs& args() const;
  kernels::AttentionArgs& args();  // to set what the case has no field for

  // Every byte of the output buffers that is not an element of a result is as it was.
  bool NothingElseWritten() const;

 private:
  struct Storage;
  std::unique_ptr<Storage> storage_;
};

}  // namespace attn::reference
