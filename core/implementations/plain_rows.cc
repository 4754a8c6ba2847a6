#include "core/implementations/plain_rows.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "kernels/cpu/page_packing.h"
#include "kernels/page_layout.h"

namespace attn {
namespace {

using kernels::AttentionArgs;
using kernels::KeyValueSpan;
using kernels::Sequence;

constexpr std::int64_t kPageTokens = kernels::kPageTokens;

DType RowType(const AttentionShape& shape) {
  return shape.dtype == shape.kv_dtype ? shape.kv_dtype : DType::kFloat32;
}

// Of one token, over all heads: a row of zeros stands in for those that were let go.
std::int64_t TokenElements(const AttentionShape& shape) {
  return shape.num_kv_heads * (shape.head_dim + shape.value_dim);
}

// The pages of one row and KV head, and the rows that they become.
struct Source {
  const Sequence* sequence;
  const KeyValueSpan* span;  // of tokens [first, kv_len)
  std::int64_t first;
};

void UnpackHead(const AttentionArgs& args, DType dtype, const Source& source, std::int64_t head) {
  const kernels::PageLayout layout = {args.kv_dtype, args.head_dim, args.value_dim};
  const auto item = static_cast<std::int64_t>(ItemSize(dtype));
  const KeyValueSpan& span = *source.span;
  for (std::int64_t token = source.first; token < source.sequence->kv_len;) {
    const std::int64_t within = token % kPageTokens;
    const std::int64_t count = std::min(kPageTokens - within, source.sequence->kv_len - token);
    const void* const page =
        static_cast<const char*>(source.sequence->pages.blocks[token / kPageTokens]) +
        head * source.sequence->pages.head_stride;
    const auto at = [&](const kernels::RowsView& rows) {
      const std::int64_t element =
          (token - source.first) * rows.row_stride + head * rows.head_stride;
      return static_cast<char*>(const_cast<void*>(rows.data)) + element * item;
    };
    kernels::cpu::UnpackTokens(layout, page, {within, count},
                               {ToElementType(dtype), at(span.key), at(span.value),
                                span.key.row_stride, span.value.row_stride});
    token += count;
  }
}

}  // namespace

std::uint64_t PlainRows::WorkspaceBytes(const AttentionShape& shape) {
  if (!shape.paged) return 0;
  return static_cast<std::uint64_t>((shape.paged_tokens + 1) * TokenElements(shape)) *
         ItemSize(RowType(shape));
}

// `memory` begins with a token of zeros; `at` counts the tokens that are taken.
std::int64_t PlainRows::AddRow(const Sequence& sequence, char* memory, std::int64_t& at) {
  const auto item = static_cast<std::int64_t>(ItemSize(shape_.kv_dtype));
  const std::int64_t trimmed = TrimmedKeys(args_, sequence);
  const std::int64_t held = std::max(trimmed, sequence.pages.first_token);
  const std::int64_t tokens = sequence.kv_len - held;
  Sequence& row = sequences_.emplace_back(sequence);
  row.kv_len -= trimmed;
  row.first_query_position -= trimmed;
  row.pages = {};
  row.spans = spans_.data() + spans_.size();
  if (held > trimmed) {  // hidden from every query
    spans_.push_back({{memory, 0, 0}, {memory, 0, 0}, held - trimmed});
  }
  if (tokens > 0) {
    char* const keys = memory + at * TokenElements(shape_) * item;
    char* const values = keys + tokens * shape_.num_kv_heads * shape_.head_dim * item;
    spans_.push_back({{keys, shape_.head_dim, tokens * shape_.head_dim},
                      {values, shape_.value_dim, tokens * shape_.value_dim},
                      tokens});
  }
  row.num_spans = spans_.data() + spans_.size() - row.spans;
  at += tokens;
  return held;
}

absl::StatusOr<PlainRows> PlainRows::Create(const AttentionArgs& args, const AttentionShape& shape,
                                            ExecutionContext& context) {
  PlainRows plain;
  plain.args_ = args;
  plain.shape_ = shape;
  if (!args.paged) return plain;
  plain.shape_.kv_dtype = RowType(shape);
  ATTN_ASSIGN_OR_RETURN(void* const memory, context.workspace.Take(WorkspaceBytes(shape)));
  std::memset(memory, 0,
              static_cast<std::size_t>(TokenElements(shape)) * ItemSize(plain.shape_.kv_dtype));
  const auto count = static_cast<std::size_t>(args.num_sequences);
  plain.sequences_.reserve(count);
  plain.spans_.reserve(2 * count);  // sequences point into it
  std::vector<Source> sources;
  std::int64_t at = 1;
  for (std::int64_t i = 0; i < args.num_sequences; ++i) {
    const Sequence& sequence = args.sequences[i];
    const std::int64_t first = plain.AddRow(sequence, static_cast<char*>(memory), at);
    if (first < sequence.kv_len) sources.push_back({&sequence, &plain.spans_.back(), first});
  }
  context.device.executor().ParallelFor(
      static_cast<std::int64_t>(sources.size()) * args.num_kv_heads, [&](std::int64_t task, int) {
        if (context.IsCancelled()) return;
        UnpackHead(args, plain.shape_.kv_dtype,
                   sources[static_cast<std::size_t>(task / args.num_kv_heads)],
                   task % args.num_kv_heads);
      });
  plain.args_.paged = false;
  plain.args_.kv_dtype = ToElementType(plain.shape_.kv_dtype);
  plain.args_.sequences = plain.sequences_.data();
  plain.shape_ = ShapeOf(plain.args_);
  plain.shape_.ragged = shape.ragged;
  plain.shape_.output_lse = shape.output_lse;
  return plain;
}

}  // namespace attn
