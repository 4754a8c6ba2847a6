#include "core/benchmark_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/attention_implementation.h"
#include "core/dtype_conversion.h"
#include "core/error.h"
#include "core/reference_attention.h"

namespace attn {
namespace {

constexpr std::int64_t kFewestRows = 4;
constexpr std::int64_t kMostRows = 64;
// Elements of keys and values that all rows together read; some 3 ns each.
constexpr std::int64_t kElements = 8 << 20;

std::int64_t RowsOf(const kernels::AttentionArgs& args) {
  std::int64_t longest = 1;
  for (std::int64_t i = 0; i < args.num_sequences; ++i) {
    longest = std::max(longest, args.sequences[i].kv_len);
  }
  const std::int64_t each = longest * std::max<std::int64_t>(args.head_dim + args.value_dim, 1);
  return std::clamp(kElements / each, kFewestRows, kMostRows);
}

}  // namespace

absl::StatusOr<ReferenceSample> ReferenceSample::Create(const kernels::AttentionArgs& args,
                                                        absl::FunctionRef<absl::Status()> between) {
  ReferenceSample sample;
  const std::int64_t count = RowsOf(args);
  for (std::int64_t i = 0; i < count && args.num_sequences > 0; ++i) {
    Row row;
    row.sequence = i % args.num_sequences;
    const std::int64_t q_len = args.sequences[row.sequence].q_len;
    if (q_len == 0) continue;
    // Steps that have no divisor in common with usual sizes reach all parts of them.
    const std::int64_t turn = i / args.num_sequences;
    row.row = turn % 3 == 0 ? q_len - 1 : turn % 3 == 1 ? 0 : (turn * 7919 + i) % q_len;
    row.head = (i * 5 + turn) % args.num_heads;
    ATTN_RETURN_IF_ERROR(between());
    ATTN_ASSIGN_OR_RETURN(row.output, ReferenceRow(args, row.sequence, row.row, row.head));
    sample.rows_.push_back(std::move(row));
  }
  return sample;
}

ErrorFigures ReferenceSample::Compare(const kernels::AttentionArgs& args) const {
  ErrorFigures figures;
  double difference = 0.0;
  double norm = 0.0;
  const DType dtype = FromElementType(args.output_dtype);
  std::vector<float> values(static_cast<std::size_t>(args.value_dim));
  for (const Row& row : rows_) {
    const kernels::MutableRowsView& output = args.sequences[row.sequence].output;
    const std::int64_t at = row.row * output.row_stride + row.head * output.head_stride;
    ConvertElements(
        static_cast<const char*>(output.data) + at * static_cast<std::int64_t>(ItemSize(dtype)),
        dtype, values.data(), DType::kFloat32, values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double error = std::abs(static_cast<double>(values[i]) - row.output[i]);
      if (!(error <= figures.max_abs)) figures.max_abs = error;  // NaN stays
      difference += error * error;
      norm += row.output[i] * row.output[i];
    }
    if (std::isnan(figures.max_abs)) break;
  }
  if (std::isnan(figures.max_abs)) {
    figures.relative = figures.max_abs;
  } else if (difference > 0.0) {
    figures.relative =
        norm > 0.0 ? std::sqrt(difference / norm) : std::numeric_limits<double>::infinity();
  }
  return figures;
}

}  // namespace attn
