// The plain structs that every attention kernel takes: pointers, extents, element strides. A batch
// is a list of sequences of differing lengths, so dense, padded, packed, prefill and decode batches
// are the same call. C headers only: units compiled for one instruction set include this file (an
// inline function of the C++ library compiled there could be linked into the whole program).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace attn::kernels {

// Of queries, keys, values, outputs and weights. Arithmetic accumulates in float32 whatever the
// element type. Int8 is of keys and values in pages alone, which hold the scales that it needs.
enum class ElementType : int32_t { kFloat32, kFloat16, kBFloat16, kInt8 };

// What a mask's elements are. Boolean: one byte, any value but 0 lets the query attend. Otherwise
// added to the score.
enum class MaskType : int32_t { kNone, kBool, kFloat32, kFloat16, kBFloat16 };

// Which stage of the score matrix is written to Sequence::weights (the ONNX Attention operator's
// order: scale, soft cap, masks and biases, softmax).
enum class ScoreStage : int32_t { kNone, kScaled, kSoftCapped, kMasked, kProbabilities };

// Rows of several heads: element (row, head, i) lies at data[row * row_stride + head * head_stride
// + i]. Strides in elements, either may be 0 or any other value. Loads must not assume alignment
// beyond the element's own.
struct RowsView {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

struct MutableRowsView {
  void* data = nullptr;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

// Consecutive keys and values: [length, num_kv_heads, head_dim] and [length, num_kv_heads,
// value_dim] by strides.
struct KeyValueSpan {
  RowsView key;
  RowsView value;
  int64_t length = 0;
};

// Keys and values in a paged cache (kernels/page_layout.h says where a token lies in a page).
struct PageTable {
  // Block i holds the tokens [64 i, 64 i + 64): a page for each KV head, one behind the other. Null
  // where all of them were let go.
  const void* const* blocks = nullptr;
  int64_t head_stride = 0;  // bytes from one head's page to the next
  int64_t first_token = 0;  // tokens before it were let go: no query sees them
};

// One batch row: its queries against its keys. These are the spans end to end (a carried past, then
// the new tokens), or, where AttentionArgs::paged, the tokens [0, kv_len) of the pages.
struct Sequence {
  int64_t q_len = 0;   // may be 0
  int64_t kv_len = 0;  // sum of the spans' lengths; may be 0
  int64_t first_query_position =
      0;                   // place of query 0 among the keys; may be negative or beyond them
  int64_t mask_row = 0;    // index of this sequence along the mask's batch dimension
  RowsView query;          // [q_len, num_heads, head_dim]
  MutableRowsView output;  // [q_len, num_heads, value_dim]
  const KeyValueSpan* spans = nullptr;
  int64_t num_spans = 0;
  PageTable pages;
  float* lse = nullptr;  // (row, head) at lse[row * lse_row_stride + head * lse_head_stride]; null:
                         // not asked for
  int64_t lse_row_stride = 0;
  int64_t lse_head_stride = 0;
  void* weights = nullptr;  // (head, row, key) at weights[head * head_stride + row * row_stride +
                            // key]; null: not asked
  int64_t weights_head_stride = 0;
  int64_t weights_row_stride = 0;
};

// Element (b, h, i, j) lies at data[b * batch_stride + h * head_stride + i * query_stride + j *
// key_stride]; a stride of 0 broadcasts. i and j count from the sequence's own first query and key.
// Keys from kv_extent on are hidden.
struct Mask {
  MaskType type = MaskType::kNone;
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t query_stride = 0;
  int64_t key_stride = 0;
  int64_t kv_extent = 0;
};

// score = scale * q . k; soft cap; mask and biases; softmax with the sink logit in its denominator;
// times v. Query i of a sequence stands at p = first_query_position + i and sees key j only if
//   is_causal    -> j <= p,    window_left >= 0 -> j >= p - window_left,    window_right >= 0 -> j
//   <= p + window_right
// and the mask lets it. A row that sees no key: output zero, LSE -inf (with a sink: the sink's
// logit), probabilities zero. Query head h uses key/value head h / (num_heads / num_kv_heads).
struct AttentionArgs {
  ElementType dtype = ElementType::kFloat32;         // of the query
  ElementType kv_dtype = ElementType::kFloat32;      // of key and value
  ElementType output_dtype = ElementType::kFloat32;  // of output and weights
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t value_dim = 0;
  float scale = 1.0f;
  float soft_cap = 0.0f;  // s -> soft_cap * tanh(s / soft_cap); 0: off
  bool is_causal = false;
  int64_t window_left = -1;             // -1: off
  int64_t window_right = -1;            // -1: off
  const float* alibi_slopes = nullptr;  // [num_heads]: adds -slope * |p - j|; null: off
  const float* sink_logits = nullptr;   // [num_heads]; null: off
  Mask mask;
  ScoreStage stage = ScoreStage::kNone;
  bool paged = false;  // keys and values lie in pages, of all sequences alike
  const Sequence* sequences = nullptr;
  int64_t num_sequences = 0;
};

// How an execution is cut: independent tasks, and the scratch memory that they need.
struct TaskPlan {
  int64_t num_tasks = 0;
  size_t task_workspace_bytes = 0;  // of one running task; 64-byte aligned when handed out
};

}  // namespace attn::kernels
