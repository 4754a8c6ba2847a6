#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/attention_implementation.h"
#include "core/error.h"
#include "core/implementations/flash_attention.h"
#include "core/implementations/memory_efficient_attention.h"
#include "core/implementations/sparse_attention.h"
#include "core/implementations/standard_attention.h"
#include "core/implementations/torch_sdpa_attention.h"

namespace attn {

ImplementationTable BuiltInImplementations() {
  static const std::vector<ImplementationRow> rows = {
      FlashAttentionRow(),           TorchSdpaAttentionRow(), StandardAttentionRow(),
      MemoryEfficientAttentionRow(), SparseAttentionRow(),
  };
  return rows;
}

std::string SupportingNames(ImplementationTable table, const AttentionShape& shape) {
  std::vector<std::string> names;
  for (const ImplementationRow& row : table) {
    if (row.supports(shape).ok()) names.push_back(row.name);
  }
  return names.empty() ? "none" : absl::StrJoin(names, ", ");
}

const ImplementationRow* FindImplementation(ImplementationTable table, const std::string& name) {
  const auto row = std::find_if(table.begin(), table.end(),
                                [&](const ImplementationRow& r) { return r.name == name; });
  return row == table.end() ? nullptr : &*row;
}

std::int64_t FirstVisibleKey(const kernels::AttentionArgs& args,
                             const kernels::Sequence& sequence) {
  // The first query that sees a key at all; earlier ones stand too far before key 0.
  std::int64_t query = sequence.first_query_position;
  if (args.is_causal) query = std::max<std::int64_t>(query, 0);
  if (args.window_right >= 0) query = std::max(query, -args.window_right);
  const std::int64_t last = sequence.first_query_position + sequence.q_len - 1;
  if (query > last) return sequence.kv_len;
  if (args.window_left < 0) return 0;
  return std::clamp<std::int64_t>(query - args.window_left, 0, sequence.kv_len);
}

std::int64_t TrimmedKeys(const kernels::AttentionArgs& args, const kernels::Sequence& sequence) {
  const bool counts_keys =
      args.mask.type != kernels::MaskType::kNone || args.stage != kernels::ScoreStage::kNone;
  return args.paged && !counts_keys ? FirstVisibleKey(args, sequence) : 0;
}

AttentionShape ShapeOf(const kernels::AttentionArgs& args) {
  AttentionShape shape;
  shape.batch = args.num_sequences;
  shape.num_heads = args.num_heads;
  shape.num_kv_heads = args.num_kv_heads;
  shape.head_dim = args.head_dim;
  shape.value_dim = args.value_dim;
  for (std::int64_t i = 0; i < args.num_sequences; ++i) {
    const kernels::Sequence& sequence = args.sequences[i];
    shape.ragged = shape.ragged || sequence.q_len != args.sequences[0].q_len ||
                   sequence.kv_len != args.sequences[0].kv_len;
    shape.rows.push_back({sequence.q_len, sequence.kv_len, sequence.first_query_position});
    shape.q_len = std::max(shape.q_len, sequence.q_len);
    shape.kv_len = std::max(shape.kv_len, sequence.kv_len);
    const std::int64_t trimmed = TrimmedKeys(args, sequence);
    const std::int64_t pairs = sequence.q_len * (sequence.kv_len - trimmed);
    shape.pairs += pairs;
    shape.longest_pairs = std::max(shape.longest_pairs, pairs);
    if (args.paged) {
      shape.paged_tokens += sequence.kv_len - std::max(trimmed, sequence.pages.first_token);
    }
    shape.split_keys = shape.split_keys || sequence.num_spans > 1;
    shape.output_lse = shape.output_lse || sequence.lse != nullptr;
  }
  shape.paged = args.paged;
  shape.dtype = FromElementType(args.dtype);
  shape.kv_dtype = FromElementType(args.kv_dtype);
  shape.output_dtype = FromElementType(args.output_dtype);
  shape.is_causal = args.is_causal;
  shape.has_window = args.window_left >= 0 || args.window_right >= 0;
  shape.window_left = args.window_left;
  shape.window_right = args.window_right;
  shape.has_soft_cap = args.soft_cap > 0.0f;
  shape.has_alibi = args.alibi_slopes != nullptr;
  shape.has_sinks = args.sink_logits != nullptr;
  shape.mask = args.mask.type;
  shape.mask_extent = args.mask.kv_extent;
  shape.stage = args.stage;
  return shape;
}

ShapeProblem::ShapeProblem(const AttentionShape& shape) {
  args_.dtype = ToElementType(shape.dtype);
  args_.kv_dtype = ToElementType(shape.kv_dtype);
  args_.output_dtype = ToElementType(shape.output_dtype);
  args_.num_heads = shape.num_heads;
  args_.num_kv_heads = shape.num_kv_heads;
  args_.head_dim = shape.head_dim;
  args_.value_dim = shape.value_dim;
  args_.is_causal = shape.is_causal;
  args_.window_left = shape.window_left;
  args_.window_right = shape.window_right;
  args_.mask.type = shape.mask;
  args_.mask.kv_extent = shape.mask_extent;
  args_.paged = shape.paged;
  args_.stage = shape.stage;
  for (std::int64_t i = 0; i < shape.batch; ++i) {
    const RowShape row = shape.rows.empty()
                             ? RowShape{shape.q_len, shape.kv_len, shape.kv_len - shape.q_len}
                             : shape.rows[static_cast<std::size_t>(i)];
    kernels::Sequence& sequence = sequences_.emplace_back();
    sequence.q_len = row.q_len;
    sequence.kv_len = row.kv_len;
    sequence.first_query_position = row.first_query_position;
    if (shape.stage != kernels::ScoreStage::kNone) sequence.weights = &args_;  // asked for
  }
  args_.sequences = sequences_.data();
  args_.num_sequences = shape.batch;
}

ComputeComplexity AttentionComplexity(const AttentionShape& shape) {
  // Integer arithmetic in double would lose nothing that matters, but saturates instead of
  // wrapping.
  double pairs = static_cast<double>(shape.pairs);
  if (shape.is_causal && shape.q_len > 1) {
    // Of q_len queries at the end of kv_len keys, the first sees kv_len - q_len + 1.
    const double kv_len = static_cast<double>(std::max<std::int64_t>(shape.kv_len, 1));
    const double hidden = static_cast<double>(std::min(shape.q_len, shape.kv_len) - 1) / 2.0;
    pairs *= (kv_len - hidden) / kv_len;
  }
  const double flops = 2.0 * pairs * static_cast<double>(shape.num_heads) *
                       static_cast<double>(shape.head_dim + shape.value_dim);
  return {flops >= 1.8e19 ? UINT64_MAX : static_cast<std::uint64_t>(flops), "O(n^2 d)"};
}

ComputeComplexity AttentionImplementation::Complexity(const AttentionShape& shape) const {
  return AttentionComplexity(shape);
}

absl::Status Unsupported(const std::string& what) {
  return MakeError(absl::StatusCode::kFailedPrecondition, "UNSUPPORTED_BY_IMPLEMENTATION", what);
}

}  // namespace attn
