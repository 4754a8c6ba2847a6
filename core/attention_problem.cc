#include "core/attention_problem.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/attention_problem_builder.h"
#include "core/checked_math.h"

namespace attn {
namespace {

char* At(void* base, DType dtype, std::int64_t element) {
  return static_cast<char*>(base) + element * static_cast<std::int64_t>(ItemSize(dtype));
}

const char* At(const void* base, DType dtype, std::int64_t element) {
  return static_cast<const char*>(base) + element * static_cast<std::int64_t>(ItemSize(dtype));
}

// An empty tensor has no address.
void FillZero(void* data, std::size_t bytes) {
  if (bytes > 0) std::memset(data, 0, bytes);
}

// One batch row's rows [first, first + length) of `from` behind row `at` of its row in `to`, which
// is dense in `layout`.
void CopyRows(const kernels::RowsView& from, std::int64_t length, DType dtype, std::int64_t heads,
              std::int64_t dim, TensorLayout layout, std::int64_t to_length, void* to,
              std::int64_t at) {
  const bool heads_first = layout == TensorLayout::kHeadsFirst;
  const std::int64_t row_stride = heads_first ? dim : heads * dim;
  const std::int64_t head_stride = heads_first ? to_length * dim : dim;
  const auto row_bytes = static_cast<std::size_t>(dim) * ItemSize(dtype);
  for (std::int64_t head = 0; head < heads; ++head) {
    const char* source = At(from.data, dtype, head * from.head_stride);
    char* target = At(to, dtype, head * head_stride + at * row_stride);
    if (from.row_stride == dim && row_stride == dim) {
      if (length > 0) std::memcpy(target, source, row_bytes * static_cast<std::size_t>(length));
      continue;
    }
    for (std::int64_t row = 0; row < length; ++row) {
      std::memcpy(At(static_cast<void*>(target), dtype, row * row_stride),
                  At(static_cast<const void*>(source), dtype, row * from.row_stride), row_bytes);
    }
  }
}

}  // namespace

std::size_t OutputSpec::bytes() const {
  if (!defined()) return 0;
  std::uint64_t bytes = ItemSize(dtype);
  for (std::int64_t extent : shape)
    bytes = SaturatingMultiply(bytes, static_cast<std::uint64_t>(extent));
  return bytes;
}

std::size_t AttentionProblem::Outputs::bytes() const {
  std::uint64_t bytes = 0;
  for (const OutputSpec* spec : {&output, &attention_weights, &lse, &present_key, &present_value}) {
    bytes = SaturatingAdd(bytes, spec->bytes());
  }
  return bytes;
}

absl::StatusOr<AttentionProblem> AttentionProblem::Create(const AttendInputs& inputs,
                                                          const LayerSpec* layer,
                                                          std::int64_t max_tokens) {
  return ProblemBuilder(inputs, layer, max_tokens).Build();
}

std::size_t AttentionProblem::owned_bytes() const {
  return sequences_.capacity() * sizeof(kernels::Sequence) +
         spans_.capacity() * sizeof(kernels::KeyValueSpan) +
         query_starts_.capacity() * sizeof(std::int64_t) + padding_mask_.capacity();
}

void AttentionProblem::Bind(const AttendOutputs& outputs) {
  const std::int64_t heads = shape_.num_heads;
  const std::int64_t dim = shape_.value_dim;
  const bool heads_first = layout_ == TensorLayout::kHeadsFirst;
  if (shape_.ragged) {  // padding stays zero; kernels write the rows that are there
    FillZero(outputs.output.data, outputs_.output.bytes());
    FillZero(outputs.attention_weights.data, outputs_.attention_weights.bytes());
    if (outputs_.lse.defined()) {
      std::fill_n(static_cast<float*>(outputs.lse.data), outputs_.lse.bytes() / sizeof(float),
                  -std::numeric_limits<float>::infinity());
    }
  }
  for (std::size_t i = 0; i < sequences_.size(); ++i) {
    kernels::Sequence& sequence = sequences_[i];
    const auto b = static_cast<std::int64_t>(i);
    const bool packed = layout_ == TensorLayout::kPacked;
    const std::int64_t start = packed ? query_starts_[i] : b * padded_q_len_;
    sequence.output = {At(outputs.output.data, shape_.output_dtype, start * heads * dim),
                       heads_first ? dim : heads * dim, heads_first ? padded_q_len_ * dim : dim};
    if (outputs_.lse.defined()) {
      sequence.lse = static_cast<float*>(outputs.lse.data) + start * heads;
      sequence.lse_row_stride = packed ? heads : 1;
      sequence.lse_head_stride = packed ? 1 : padded_q_len_;
    }
    if (outputs_.attention_weights.defined()) {
      sequence.weights = At(outputs.attention_weights.data, outputs_.attention_weights.dtype,
                            b * heads * shape_.q_len * shape_.kv_len);
      sequence.weights_head_stride = shape_.q_len * shape_.kv_len;
      sequence.weights_row_stride = shape_.kv_len;
    }
  }
  if (outputs_.present_key.defined()) CopyPresent(outputs);
}

void AttentionProblem::CopyPresent(const AttendOutputs& outputs) {
  const DType dtype = shape_.dtype;
  const std::int64_t heads = shape_.num_kv_heads;
  if (shape_.ragged) {
    FillZero(outputs.present_key.data, outputs_.present_key.bytes());
    FillZero(outputs.present_value.data, outputs_.present_value.bytes());
  }
  for (std::size_t i = 0; i < sequences_.size(); ++i) {
    const std::int64_t before = static_cast<std::int64_t>(i) * heads * shape_.kv_len;
    void* const key = At(outputs.present_key.data, dtype, before * shape_.head_dim);
    void* const value = At(outputs.present_value.data, dtype, before * shape_.value_dim);
    std::int64_t at = 0;
    for (std::int64_t s = 0; s < sequences_[i].num_spans; ++s) {
      const kernels::KeyValueSpan& span = sequences_[i].spans[s];
      CopyRows(span.key, span.length, dtype, heads, shape_.head_dim, present_layout_, shape_.kv_len,
               key, at);
      CopyRows(span.value, span.length, dtype, heads, shape_.value_dim, present_layout_,
               shape_.kv_len, value, at);
      at += span.length;
    }
  }
}

}  // namespace attn
