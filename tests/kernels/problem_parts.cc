#include "tests/kernels/problem_parts.h"

#include <algorithm>

#include "tests/reference/attention_reference.h"

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::KeyValueSpan;
using kernels::MaskType;
using kernels::RowsView;
using kernels::Sequence;

const void* Advance(const void* data, int64_t elements, int64_t element_bytes) {
  return static_cast<const char*>(data) + elements * element_bytes;
}

int64_t MaskBytes(MaskType type) {
  return type == MaskType::kBool ? 1 : type == MaskType::kFloat32 ? 4 : 2;
}

RowsView HeadsFrom(const RowsView& rows, int64_t head, ElementType type) {
  return {Advance(rows.data, head * rows.head_stride, ElementBytes(type)), rows.row_stride,
          rows.head_stride};
}

// The first `kv_len` keys of the spans.
std::vector<KeyValueSpan> CutSpans(const Sequence& sequence, int64_t kv_len) {
  std::vector<KeyValueSpan> spans(sequence.spans, sequence.spans + sequence.num_spans);
  for (KeyValueSpan& span : spans) {
    span.length = std::min(span.length, kv_len);
    kv_len -= span.length;
  }
  return spans;
}

}  // namespace

ProblemParts::ProblemParts(const AttentionArgs& whole, const std::vector<ProblemPart>& parts)
    : ProblemParts(whole, parts, 0, whole.num_kv_heads) {}

ProblemParts::ProblemParts(const AttentionArgs& whole, const std::vector<ProblemPart>& parts,
                           int64_t first_kv_head, int64_t end_kv_head)
    : args_(whole) {
  const int64_t group = whole.num_heads / whole.num_kv_heads;
  const int64_t head = first_kv_head * group;
  args_.num_kv_heads = end_kv_head - first_kv_head;
  args_.num_heads = args_.num_kv_heads * group;
  if (whole.alibi_slopes != nullptr) args_.alibi_slopes += head;
  if (whole.sink_logits != nullptr) args_.sink_logits += head;
  for (const ProblemPart& part : parts) AddPart(whole, part, first_kv_head);
  // The mask's queries count from the sequence's first: it moves with the part, so that parts of
  // masked problems come one by one.
  if (whole.mask.type != MaskType::kNone) {
    const int64_t row = parts.empty() ? 0 : parts[0].first_row;
    args_.mask.data =
        Advance(whole.mask.data, head * whole.mask.head_stride + row * whole.mask.query_stride,
                MaskBytes(whole.mask.type));
  }
  args_.sequences = sequences_.data();
  args_.num_sequences = static_cast<int64_t>(sequences_.size());
}

void ProblemParts::AddPart(const AttentionArgs& whole, const ProblemPart& part, int64_t kv_head) {
  const Sequence& from = whole.sequences[part.sequence];
  const int64_t head = kv_head * (whole.num_heads / whole.num_kv_heads);
  Sequence& to = sequences_.emplace_back(from);
  to.q_len = part.num_rows;
  to.kv_len = part.kv_len < 0 ? from.kv_len : part.kv_len;
  to.first_query_position += part.first_row;
  const auto at = [&](const auto& rows) {
    return part.first_row * rows.row_stride + head * rows.head_stride;
  };
  to.query.data = Advance(from.query.data, at(from.query), ElementBytes(whole.dtype));
  to.output.data = const_cast<void*>(
      Advance(from.output.data, at(from.output), ElementBytes(whole.output_dtype)));
  if (from.lse != nullptr) {
    to.lse += part.first_row * from.lse_row_stride + head * from.lse_head_stride;
  }
  if (whole.paged) {
    std::vector<const void*>& blocks = blocks_.emplace_back();
    for (int64_t token = 0; token < to.kv_len; token += 64) {
      const void* const block = from.pages.blocks[token / 64];
      blocks.push_back(block == nullptr ? nullptr
                                        : Advance(block, kv_head * from.pages.head_stride, 1));
    }
    to.pages.blocks = blocks.data();
    return;
  }
  std::vector<KeyValueSpan>& spans = spans_.emplace_back(CutSpans(from, to.kv_len));
  for (KeyValueSpan& span : spans) {
    span.key = HeadsFrom(span.key, kv_head, whole.kv_dtype);
    span.value = HeadsFrom(span.value, kv_head, whole.kv_dtype);
  }
  to.spans = spans.data();
}

ProblemPart WholeSequence(const AttentionArgs& args, int64_t sequence) {
  return {sequence, 0, args.sequences[sequence].q_len, -1};
}

std::vector<ProblemPart> ChunksOf(const AttentionArgs& args, int64_t sequence, int64_t rows) {
  const Sequence& whole = args.sequences[sequence];
  std::vector<ProblemPart> chunks;
  for (int64_t first = 0; first < whole.q_len; first += rows) {
    ProblemPart chunk = {sequence, first, std::min(rows, whole.q_len - first), -1};
    const int64_t end = whole.first_query_position + first + chunk.num_rows;
    if (args.is_causal) chunk.kv_len = std::clamp<int64_t>(end, 0, whole.kv_len);
    chunks.push_back(chunk);
  }
  return chunks;
}

}  // namespace attn::reference
