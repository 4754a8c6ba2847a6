#include "core/reference_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/status/status.h"
#include "core/attention_implementation.h"
#include "core/dtype_conversion.h"

namespace attn {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::KeyValueSpan;
using kernels::Mask;
using kernels::MaskType;
using kernels::RowsView;
using kernels::Sequence;

constexpr double kHidden = -std::numeric_limits<double>::infinity();

float ElementAt(const void* data, ElementType type, std::int64_t index) {
  float value;
  const std::int64_t bytes = type == ElementType::kFloat32 ? 4 : 2;
  ConvertElements(static_cast<const char*>(data) + index * bytes, FromElementType(type), &value,
                  DType::kFloat32, 1);
  return value;
}

// A row of one head as float32, which holds every element exactly.
std::vector<float> RowOf(const RowsView& rows, ElementType type, std::int64_t row,
                         std::int64_t head, std::int64_t dim) {
  std::vector<float> values(static_cast<std::size_t>(dim));
  const std::int64_t at = row * rows.row_stride + head * rows.head_stride;
  const std::int64_t bytes = type == ElementType::kFloat32 ? 4 : 2;
  ConvertElements(static_cast<const char*>(rows.data) + at * bytes, FromElementType(type),
                  values.data(), DType::kFloat32, values.size());
  return values;
}

// What the mask adds to the score: 0, a bias, or -inf.
double MaskBias(const Mask& mask, std::int64_t batch, std::int64_t head, std::int64_t row,
                std::int64_t key) {
  if (mask.type == MaskType::kNone) return 0.0;
  if (key >= mask.kv_extent) return kHidden;
  const std::int64_t at = batch * mask.batch_stride + head * mask.head_stride +
                          row * mask.query_stride + key * mask.key_stride;
  switch (mask.type) {
    case MaskType::kBool:
      return static_cast<const std::uint8_t*>(mask.data)[at] != 0 ? 0.0 : kHidden;
    case MaskType::kFloat16:
      return static_cast<double>(ElementAt(mask.data, ElementType::kFloat16, at));
    case MaskType::kBFloat16:
      return static_cast<double>(ElementAt(mask.data, ElementType::kBFloat16, at));
    default:
      return static_cast<double>(ElementAt(mask.data, ElementType::kFloat32, at));
  }
}

bool IsVisible(const AttentionArgs& args, std::int64_t position, std::int64_t key) {
  if (args.is_causal && key > position) return false;
  if (args.window_left >= 0 && key < position && position - key > args.window_left) return false;
  return args.window_right < 0 || key <= position || key - position <= args.window_right;
}

}  // namespace

absl::StatusOr<std::vector<double>> ReferenceRow(const AttentionArgs& args, std::int64_t sequence,
                                                 std::int64_t row, std::int64_t head) {
  if (args.paged) return absl::FailedPreconditionError("the reference does not read pages");
  const Sequence& s = args.sequences[sequence];
  const std::int64_t kv_head = head / (args.num_heads / args.num_kv_heads);
  const std::int64_t position = s.first_query_position + row;
  const std::vector<float> query = RowOf(s.query, args.dtype, row, head, args.head_dim);
  std::vector<double> scores;
  scores.reserve(static_cast<std::size_t>(s.kv_len));
  for (std::int64_t span = 0; span < s.num_spans; ++span) {
    for (std::int64_t k = 0; k < s.spans[span].length; ++k) {
      const auto key = static_cast<std::int64_t>(scores.size());
      const std::vector<float> keys =
          RowOf(s.spans[span].key, args.kv_dtype, k, kv_head, args.head_dim);
      double score = 0.0;
      for (std::size_t i = 0; i < keys.size(); ++i) {
        score += static_cast<double>(query[i]) * static_cast<double>(keys[i]);
      }
      score *= static_cast<double>(args.scale);
      if (args.soft_cap > 0.0f) {
        const auto cap = static_cast<double>(args.soft_cap);
        score = cap * std::tanh(score / cap);
      }
      if (args.alibi_slopes != nullptr) {
        score -= static_cast<double>(args.alibi_slopes[head]) *
                 std::abs(static_cast<double>(position - key));
      }
      score += MaskBias(args.mask, s.mask_row, head, row, key);
      scores.push_back(IsVisible(args, position, key) ? score : kHidden);
    }
  }

  std::vector<double> output(static_cast<std::size_t>(args.value_dim), 0.0);
  double top = kHidden;
  for (const double score : scores) top = std::max(top, score);
  if (top == kHidden) return output;
  const double sink =
      args.sink_logits == nullptr ? kHidden : static_cast<double>(args.sink_logits[head]);
  top = std::max(top, sink);
  double sum = std::exp(sink - top);
  std::size_t key = 0;
  for (std::int64_t span = 0; span < s.num_spans; ++span) {
    for (std::int64_t k = 0; k < s.spans[span].length; ++k, ++key) {
      if (scores[key] == kHidden) continue;
      const double weight = std::exp(scores[key] - top);
      sum += weight;
      const std::vector<float> values =
          RowOf(s.spans[span].value, args.kv_dtype, k, kv_head, args.value_dim);
      for (std::size_t i = 0; i < values.size(); ++i) {
        output[i] += weight * static_cast<double>(values[i]);
      }
    }
  }
  for (double& value : output) value /= sum;
  return output;
}

}  // namespace attn
