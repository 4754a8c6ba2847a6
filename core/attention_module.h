// An attention layer as an operation: hidden states in, hidden states out. Plan checks a call and
// states its outputs; Forward computes it, on the executor's driver, into views that the caller
// gives.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "core/attention_problem.h"

namespace attn {

class CacheCall;

struct ForwardInputs {
  TensorView hidden_states;  // [batch, q_len, hidden_size]; or [tokens, hidden_size], rows end to
                             // end, with query_lengths
  TensorView encoder_hidden_states;  // cross-attention: what keys and values are made of, [batch,
                                     // kv_len, encoder_hidden_size]; or [tokens,
                                     // encoder_hidden_size] with kv_lengths
  TensorView attention_mask;         // as AttendInputs::attention_mask; undefined: none
  TensorView position_ids;  // int64 [batch or 1, q_len] (packed: [tokens]), or with axes in front
  TensorView past_key;      // [batch, num_kv_heads, length, head_dim] in the model's dtype
  TensorView past_value;    // [batch, num_kv_heads, length, value_dim]
  std::vector<std::int64_t> query_lengths;  // tokens of each row, the rest is padding; empty: all
  std::vector<std::int64_t> kv_lengths;     // the same for encoder_hidden_states
  CacheCall* cache = nullptr;  // rows in sessions; null: none. Lives until the call is done
  bool output_attentions = false;
  bool use_cache = false;
  AttentionOptions options;  // over the layer's
};

struct ForwardOutputs {
  MutableTensorView output;             // as hidden_states
  MutableTensorView attention_weights;  // [batch, num_heads, q_len, kv_len] in the model's dtype
  MutableTensorView
      present_key;  // [batch, num_kv_heads, past and new, head_dim] in the model's dtype
  MutableTensorView present_value;
};

struct ForwardPlan {
  AttentionShape shape;               // of the attention inside
  AttentionProblem::Outputs outputs;  // shapes and dtypes of ForwardOutputs
};

class AttentionModule {
 public:
  virtual ~AttentionModule() = default;

  // INVALID_ARGUMENT, or OUT_OF_RANGE (positions, tokens that a cache let go).
  virtual absl::StatusOr<ForwardPlan> Plan(const ForwardInputs& inputs) const = 0;

  // FAILED_PRECONDITION where the implementation can't do what is asked, with nothing written. A
  // cache has its new tokens then, which its call may commit.
  virtual absl::Status Forward(const ForwardInputs& inputs, const ForwardOutputs& outputs,
                               ExecutionContext& context) const = 0;

  // Scratch memory of one execution of this shape, projections included.
  virtual attn::MemoryUsage MemoryUsage(const AttentionShape& shape, int workers) const = 0;
  virtual attn::ComputeComplexity ComputeComplexity(const AttentionShape& shape) const = 0;
};

}  // namespace attn
