// The checks behind AttentionProblem::Create, one step per group of fields.
#pragma once

#include <string>

#include "core/attention_problem.h"

namespace attn {

// Positions beyond this are refused and windows clamped, so that sums of them can't overflow.
inline constexpr std::int64_t kMaxPosition = std::int64_t{1} << 40;

class ProblemBuilder {
 public:
  ProblemBuilder(const AttendInputs& inputs, const LayerSpec* layer, std::int64_t max_tokens)
      : inputs_(inputs), layer_(layer), max_tokens_(max_tokens) {}

  absl::StatusOr<AttentionProblem> Build();

 private:
  // A tensor of rows in any layout, as [batch, heads, length, dim] by strides; packed: batch 1,
  // length all tokens.
  struct Rows {
    const void* data = nullptr;
    DType dtype = DType::kUnspecified;
    std::int64_t batch = 0, heads = 0, length = 0, dim = 0;
    std::int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

    kernels::RowsView View(std::int64_t row, std::int64_t first) const;
  };

  static absl::StatusOr<Rows> ReadRows(const char* field, const TensorView& view,
                                       TensorLayout layout);
  absl::Status CheckTensors();
  absl::Status ReadKeys();
  absl::Status CheckCacheDims();
  absl::Status CheckCachedRows();
  absl::Status CheckVisible() const;
  absl::Status CheckLayer();
  absl::Status CheckPast();
  absl::Status ReadLengths(const char* field, bool packed, const std::vector<std::int64_t>& given,
                           std::int64_t length, std::vector<std::int64_t>& lengths,
                           std::vector<std::int64_t>& starts);
  absl::Status ReadKeyLengths();
  absl::Status CheckLengths();
  absl::Status CheckRowCount() const;
  std::int64_t PastLength(std::size_t row) const {
    return inputs_.cache != nullptr ? inputs_.cache->lengths[row] : past_length_;
  }
  TensorLayout kv_layout() const { return inputs_.kv_layout.value_or(inputs_.layout); }
  bool brings_keys() const {
    return inputs_.cache == nullptr || inputs_.cache->mode != CacheMode::kReadOnly;
  }
  absl::Status CheckOptions();
  absl::Status ReadHeadValues(const char* field, const std::vector<float>& given, bool finite,
                              std::vector<float>& values);
  absl::Status CheckMask();
  absl::Status CopyPaddingMask();
  void MakeSequences();
  void DescribeProblem();
  absl::Status DescribeOutputs();

  const AttendInputs& inputs_;
  const LayerSpec* const layer_;
  const std::int64_t max_tokens_;

  AttentionProblem problem_;
  Rows query_, key_, value_, past_key_, past_value_;
  std::int64_t batch_ = 0;
  std::int64_t past_length_ = 0;  // carried by the caller
  std::vector<std::int64_t> query_lengths_, kv_lengths_, kv_starts_;
  std::int64_t q_len_ = 0, kv_len_ = 0;                // of the longest row, past included
  std::int64_t padded_q_len_ = 0, padded_kv_len_ = 0;  // of the tensors
};

}  // namespace attn
