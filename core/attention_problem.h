// Attention on given queries, keys and values as a caller states it: checked once, and turned into
// what kernels take. The problem owns the lists that the kernels' structs point to, and copies of
// every integer that was checked (shared memory could change under it); tensors stay where they
// are.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "core/attention_implementation.h"
#include "core/cached_rows.h"
#include "core/model_spec.h"
#include "core/tensor_view.h"

namespace attn {

// Rows of a batch: [batch, heads, length, dim] by strides (any layout but packed is such a view),
// or with PACKED [tokens, heads, dim], the rows end to end as the lengths say.
enum class TensorLayout : std::uint8_t { kHeadsFirst, kTokensFirst, kPacked };

struct AttendInputs {
  TensorLayout layout = TensorLayout::kHeadsFirst;
  std::optional<TensorLayout> kv_layout;  // of `key` and `value`; unset: `layout`
  TensorView query;                       // in the layout's own axis order
  TensorView key;
  TensorView value;
  std::vector<std::int64_t> query_lengths;         // empty: all of q_len
  std::vector<std::int64_t> kv_lengths;            // of `key` and `value`; empty: all
  std::vector<std::int64_t> first_query_position;  // empty: the last query stands at the last key
  TensorView attention_mask;                       // undefined: none
  AttentionOptions options;
  TensorLayout past_layout = TensorLayout::kHeadsFirst;
  TensorView past_key;  // carried by the caller, before `key`; undefined: none
  TensorView past_value;
  const CachedRows* cache =
      nullptr;  // rows in sessions, which `key` and `value` are added to (unset
                // with kReadOnly); null: none. Outlives the checks alone
  kernels::ScoreStage stage = kernels::ScoreStage::kNone;
  bool output_lse = false;
  bool output_present = false;
  std::optional<TensorLayout> present_layout;  // unset: `layout`
  DType output_dtype = DType::kUnspecified;    // unset: the query's
};

// Where the answer goes; each is dense, of the shape that the problem states, and undefined where
// it is not asked for.
struct AttendOutputs {
  MutableTensorView output;
  MutableTensorView attention_weights;
  MutableTensorView lse;
  MutableTensorView present_key;
  MutableTensorView present_value;
};

// Shape and dtype of an output; undefined dtype: not asked for.
struct OutputSpec {
  DType dtype = DType::kUnspecified;
  std::vector<std::int64_t> shape;

  bool defined() const { return dtype != DType::kUnspecified; }
  std::size_t bytes() const;
};

class AttentionProblem {
 public:
  struct Outputs {
    OutputSpec output;
    OutputSpec attention_weights;
    OutputSpec lse;
    OutputSpec present_key;
    OutputSpec present_value;
    std::size_t bytes() const;
  };

  // Checks everything that can be checked without looking at tensors' values, and fails with
  // INVALID_ARGUMENT naming the field; OUT_OF_RANGE where a query would see tokens that a cache let
  // go. `layer` (may be null) is the hosted layer whose heads and
  // dimensions must match and whose options hold where the request sets none. `max_tokens` bounds
  // batch times length.
  static absl::StatusOr<AttentionProblem> Create(const AttendInputs& inputs, const LayerSpec* layer,
                                                 std::int64_t max_tokens);

  AttentionProblem(AttentionProblem&&) = default;
  AttentionProblem& operator=(AttentionProblem&&) = default;

  const AttentionShape& shape() const { return shape_; }
  const Outputs& outputs() const { return outputs_; }

  // Of the lists that the problem owns.
  std::size_t owned_bytes() const;

  // With a cache: what each row adds to it, in the query's dtype; the dimensions that the cache has
  // or gets; where each row's queries begin. Its pages are bound before args() is complete.
  absl::Span<const kernels::KeyValueSpan> new_tokens() const { return spans_; }
  const CacheDims& cache_dims() const { return cache_dims_; }
  std::int64_t first_query_position(std::size_t row) const {
    return sequences_[row].first_query_position;
  }
  void BindPages(std::size_t row, const kernels::PageTable& pages) {
    sequences_[row].pages = pages;
  }

  // Puts the outputs' addresses in, zeroes padding, and copies past and new keys and values into
  // `present`. Then args() is complete; it points into this object and into the caller's tensors.
  void Bind(const AttendOutputs& outputs);
  const kernels::AttentionArgs& args() const { return args_; }

 private:
  friend class ProblemBuilder;
  AttentionProblem() = default;
  void CopyPresent(const AttendOutputs& outputs);

  AttentionShape shape_;
  Outputs outputs_;
  kernels::AttentionArgs args_;
  TensorLayout layout_ = TensorLayout::kHeadsFirst;
  TensorLayout present_layout_ = TensorLayout::kHeadsFirst;
  std::int64_t padded_q_len_ = 0;  // rows of a dense output
  std::vector<kernels::Sequence> sequences_;
  std::vector<kernels::KeyValueSpan> spans_;
  CacheDims cache_dims_;
  std::vector<std::int64_t> query_starts_;  // PACKED: each row's first token
  std::vector<std::uint8_t> padding_mask_;  // an int64 mask, as bytes
  std::vector<float> alibi_slopes_;
  std::vector<float> sink_logits_;
};

}  // namespace attn
