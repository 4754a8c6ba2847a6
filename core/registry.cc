#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/attention_implementation.h"
#include "core/error.h"
#include "core/implementations/standard_attention.h"
#include "core/implementations/torch_sdpa_attention.h"

namespace attn {

ImplementationTable BuiltInImplementations() {
  static const std::vector<ImplementationRow> rows = {
      TorchSdpaAttentionRow(),
      StandardAttentionRow(),
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

AttentionShape ShapeOf(const kernels::AttentionArgs& args) {
  const auto dtype = [](kernels::ElementType type) {
    switch (type) {
      case kernels::ElementType::kFloat16:
        return DType::kFloat16;
      case kernels::ElementType::kBFloat16:
        return DType::kBFloat16;
      case kernels::ElementType::kFloat32:
        break;
    }
    return DType::kFloat32;
  };
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
    shape.q_len = std::max(shape.q_len, sequence.q_len);
    shape.kv_len = std::max(shape.kv_len, sequence.kv_len);
    shape.pairs += sequence.q_len * sequence.kv_len;
    shape.longest_pairs = std::max(shape.longest_pairs, sequence.q_len * sequence.kv_len);
    shape.split_keys = shape.split_keys || sequence.num_spans > 1;
    shape.output_lse = shape.output_lse || sequence.lse != nullptr;
  }
  shape.dtype = dtype(args.dtype);
  shape.output_dtype = dtype(args.output_dtype);
  shape.is_causal = args.is_causal;
  shape.has_window = args.window_left >= 0 || args.window_right >= 0;
  shape.has_soft_cap = args.soft_cap > 0.0f;
  shape.has_alibi = args.alibi_slopes != nullptr;
  shape.has_sinks = args.sink_logits != nullptr;
  shape.mask = args.mask.type;
  shape.stage = args.stage;
  return shape;
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

absl::Status Unsupported(const std::string& what) {
  return MakeError(absl::StatusCode::kFailedPrecondition, "UNSUPPORTED_BY_IMPLEMENTATION", what);
}

}  // namespace attn
