#include "core/attention_problem_builder.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

// Heads and dimensions beyond these belong to no model; the bound keeps products of empty tensors'
// extents small.
constexpr std::int64_t kMaxHeads = 65536;
constexpr std::int64_t kMaxHeadDim = 65536;
constexpr std::int64_t kMaxBatch = 65536;
constexpr std::int64_t kMaxHeadsOfBatch = std::int64_t{1} << 22;

absl::Status CheckBound(const char* field, const char* what, std::int64_t value,
                        std::int64_t bound) {
  if (value >= 1 && value <= bound) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(field, " has ", what, " ", value,
                                          ", which is not between 1 and ", bound));
}

absl::Status CheckEqual(const char* field, const char* what, std::int64_t value, const char* other,
                        std::int64_t expected) {
  if (value == expected) return absl::OkStatus();
  return InvalidField(
      field, absl::StrCat(field, " has ", what, " ", value, ", but ", other, " has ", expected));
}

}  // namespace

kernels::RowsView ProblemBuilder::Rows::View(std::int64_t row, std::int64_t first) const {
  const auto size = static_cast<std::int64_t>(ItemSize(dtype));
  return {static_cast<const char*>(data) + (row * batch_stride + first * row_stride) * size,
          row_stride, head_stride};
}

absl::StatusOr<ProblemBuilder::Rows> ProblemBuilder::ReadRows(const char* field,
                                                              const TensorView& view,
                                                              TensorLayout layout) {
  if (!view.defined()) return InvalidField(field, absl::StrCat(field, " is missing"));
  if (!IsFloating(view.dtype)) {
    return InvalidField(field, absl::StrCat(field, " is ", DTypeName(view.dtype),
                                            ", but must be float32, float16 or bfloat16"));
  }
  const bool packed = layout == TensorLayout::kPacked;
  if (view.rank != (packed ? 3 : 4)) {
    return InvalidField(field, absl::StrCat(field, " has shape ", ShapeText(view),
                                            ", but must have rank ", packed ? 3 : 4));
  }
  Rows rows;
  rows.data = view.data;
  rows.dtype = view.dtype;
  const int head_axis = layout == TensorLayout::kHeadsFirst ? 1 : view.rank - 2;
  const int row_axis = layout == TensorLayout::kHeadsFirst ? 2 : view.rank - 3;
  rows.batch = packed ? 1 : view.extent(0);
  rows.batch_stride = packed ? 0 : view.stride(0);
  rows.heads = view.extent(head_axis);
  rows.head_stride = view.stride(head_axis);
  rows.length = view.extent(row_axis);
  rows.row_stride = view.stride(row_axis);
  rows.dim = view.extent(view.rank - 1);
  ATTN_RETURN_IF_ERROR(CheckBound(field, "heads", rows.heads, kMaxHeads));
  ATTN_RETURN_IF_ERROR(CheckBound(field, "last dimension", rows.dim, kMaxHeadDim));
  return rows;
}

// Without keys of its own, a call's are those of the cache, none of them new.
absl::Status ProblemBuilder::ReadKeys() {
  if (brings_keys()) {
    ATTN_ASSIGN_OR_RETURN(key_, ReadRows("key", inputs_.key, kv_layout()));
    ATTN_ASSIGN_OR_RETURN(value_, ReadRows("value", inputs_.value, kv_layout()));
    return absl::OkStatus();
  }
  for (const auto& [field, view] :
       {std::pair("key", &inputs_.key), std::pair("value", &inputs_.value)}) {
    if (!view->defined()) continue;
    return InvalidField(field, absl::StrCat(field, " is set, but a read-only call brings no keys"));
  }
  const CacheDims& dims = inputs_.cache->dims;
  if (!dims.known()) {  // there is no row whose cache has some
    return InvalidField("past_key_value.sessions.session_ids",
                        "past_key_value.sessions names no session to read");
  }
  key_ = value_ = query_;
  key_.heads = value_.heads = dims.num_kv_heads;
  key_.length = value_.length = 0;
  key_.dim = dims.head_dim;
  value_.dim = dims.value_dim;
  return absl::OkStatus();
}

absl::Status ProblemBuilder::CheckTensors() {
  ATTN_ASSIGN_OR_RETURN(query_, ReadRows("query", inputs_.query, inputs_.layout));
  ATTN_RETURN_IF_ERROR(ReadKeys());
  for (const auto& [field, rows] : {std::pair("key", &key_), std::pair("value", &value_)}) {
    if (rows->dtype != query_.dtype) {
      return InvalidField(field, absl::StrCat(field, " is ", DTypeName(rows->dtype),
                                              ", but query is ", DTypeName(query_.dtype)));
    }
    if (kv_layout() != inputs_.layout) continue;  // then ReadKeyLengths looks at the batch
    ATTN_RETURN_IF_ERROR(CheckEqual(field, "batch", rows->batch, "query", query_.batch));
  }
  if (query_.heads % key_.heads != 0) {
    return InvalidField(
        "key", absl::StrCat("key has ", key_.heads, " heads, which does not divide query's ",
                            query_.heads));
  }
  ATTN_RETURN_IF_ERROR(CheckEqual("key", "head_dim", key_.dim, "query", query_.dim));
  ATTN_RETURN_IF_ERROR(CheckEqual("value", "heads", value_.heads, "key", key_.heads));
  return CheckEqual("value", "length", value_.length, "key", key_.length);
}

absl::Status ProblemBuilder::CheckLayer() {
  if (layer_ == nullptr) return absl::OkStatus();
  ATTN_RETURN_IF_ERROR(CheckEqual("query", "heads", query_.heads, "the layer", layer_->num_heads));
  ATTN_RETURN_IF_ERROR(CheckEqual("key", "heads", key_.heads, "the layer", layer_->num_kv_heads));
  ATTN_RETURN_IF_ERROR(CheckEqual("query", "head_dim", query_.dim, "the layer", layer_->head_dim));
  return CheckEqual("value", "value_dim", value_.dim, "the layer", layer_->value_dim);
}

absl::Status ProblemBuilder::CheckPast() {
  if (!inputs_.past_key.defined() && !inputs_.past_value.defined()) return absl::OkStatus();
  if (inputs_.past_layout == TensorLayout::kPacked) {
    return InvalidField("past_key_value",
                        "past_key_value.inline_kv can't be used with a packed layout");
  }
  const std::int64_t batch = inputs_.layout == TensorLayout::kPacked
                                 ? static_cast<std::int64_t>(inputs_.query_lengths.size())
                                 : query_.batch;
  constexpr char kKey[] = "past_key_value.inline_kv.key";
  constexpr char kValue[] = "past_key_value.inline_kv.value";
  ATTN_ASSIGN_OR_RETURN(past_key_, ReadRows(kKey, inputs_.past_key, inputs_.past_layout));
  ATTN_ASSIGN_OR_RETURN(past_value_, ReadRows(kValue, inputs_.past_value, inputs_.past_layout));
  struct Pair {
    const char* field;
    const Rows& past;
    const Rows& now;
    const char* name;
  };
  for (const Pair& pair :
       {Pair{kKey, past_key_, key_, "key"}, Pair{kValue, past_value_, value_, "value"}}) {
    if (pair.past.dtype != query_.dtype) {
      return InvalidField(pair.field, absl::StrCat(pair.field, " is ", DTypeName(pair.past.dtype),
                                                   ", but query is ", DTypeName(query_.dtype)));
    }
    ATTN_RETURN_IF_ERROR(CheckEqual(pair.field, "batch", pair.past.batch, "query", batch));
    ATTN_RETURN_IF_ERROR(
        CheckEqual(pair.field, "heads", pair.past.heads, pair.name, pair.now.heads));
    ATTN_RETURN_IF_ERROR(
        CheckEqual(pair.field, "last dimension", pair.past.dim, pair.name, pair.now.dim));
  }
  ATTN_RETURN_IF_ERROR(CheckEqual(kValue, "length", past_value_.length, kKey, past_key_.length));
  past_length_ = past_key_.length;
  return absl::OkStatus();
}

absl::Status ProblemBuilder::ReadLengths(const char* field, bool packed,
                                         const std::vector<std::int64_t>& given,
                                         std::int64_t length, std::vector<std::int64_t>& lengths,
                                         std::vector<std::int64_t>& starts) {
  const auto count = static_cast<std::int64_t>(given.size());
  if (packed && given.empty() && length > 0) {
    return InvalidField(field, absl::StrCat(field, " is missing: a packed layout needs it"));
  }
  if (!packed && !given.empty() && count != batch_) {
    return InvalidField(field,
                        absl::StrCat(field, " has ", count, " entries for a batch of ", batch_));
  }
  if (given.empty() && !packed) {
    lengths.assign(static_cast<std::size_t>(batch_), length);
    starts.assign(static_cast<std::size_t>(batch_), 0);
    return absl::OkStatus();
  }
  std::int64_t start = 0;
  for (std::int64_t row : given) {
    if (row < 0 || row > length - (packed ? start : 0)) {
      return InvalidField(
          field,
          absl::StrCat(field, " has an entry of ", row, ", which is negative or beyond ",
                       packed ? "the packed tokens" : "the tensor's length", " (", length, ")"));
    }
    lengths.push_back(row);
    starts.push_back(packed ? start : 0);
    start += row;
  }
  if (packed && start != length) {
    return InvalidField(field, absl::StrCat(field, " adds up to ", start, ", but the tensor has ",
                                            length, " tokens"));
  }
  return absl::OkStatus();
}

absl::Status ProblemBuilder::CheckRowCount() const {
  // First of all: lists of the batch's length follow, and a batch of empty rows costs the caller no
  // bytes.
  if (batch_ > kMaxBatch) {
    return InvalidField(
        "query", absl::StrCat("query has batch ", batch_, ", more than the limit of ", kMaxBatch));
  }
  // Heads of all rows are the tasks of an execution, whether they have tokens or not.
  if (batch_ * query_.heads > kMaxHeadsOfBatch) {
    return InvalidField("query",
                        absl::StrCat("query has batch ", batch_, " times heads ", query_.heads,
                                     ", more than the limit of ", kMaxHeadsOfBatch));
  }
  const auto& positions = inputs_.first_query_position;
  if (!positions.empty() && static_cast<std::int64_t>(positions.size()) != batch_) {
    return InvalidField("first_query_position",
                        absl::StrCat("first_query_position has ", positions.size(),
                                     " entries for a batch of ", batch_));
  }
  for (std::int64_t position : positions) {
    if (position < -kMaxPosition || position > kMaxPosition) {
      return InvalidField("first_query_position",
                          absl::StrCat("first_query_position has an entry of ", position,
                                       ", which is not within +-", kMaxPosition));
    }
  }
  return absl::OkStatus();
}

absl::Status ProblemBuilder::ReadKeyLengths() {
  if (!brings_keys()) {
    kv_lengths_.assign(query_lengths_.size(), 0);
    kv_starts_ = kv_lengths_;
    return absl::OkStatus();
  }
  const bool packed = kv_layout() == TensorLayout::kPacked;
  if (!packed) {
    ATTN_RETURN_IF_ERROR(CheckEqual("key", "batch", key_.batch, "query", batch_));
    ATTN_RETURN_IF_ERROR(CheckEqual("value", "batch", value_.batch, "query", batch_));
  }
  ATTN_RETURN_IF_ERROR(
      ReadLengths("kv_lengths", packed, inputs_.kv_lengths, key_.length, kv_lengths_, kv_starts_));
  if (kv_lengths_.size() == query_lengths_.size()) return absl::OkStatus();
  return InvalidField("kv_lengths", absl::StrCat("kv_lengths has ", kv_lengths_.size(),
                                                 " entries for a batch of ", batch_));
}

absl::Status ProblemBuilder::CheckLengths() {
  const bool packed = inputs_.layout == TensorLayout::kPacked;
  batch_ = packed ? static_cast<std::int64_t>(inputs_.query_lengths.size()) : query_.batch;
  ATTN_RETURN_IF_ERROR(CheckRowCount());
  if (inputs_.cache != nullptr) ATTN_RETURN_IF_ERROR(CheckCachedRows());
  ATTN_RETURN_IF_ERROR(ReadLengths("query_lengths", packed, inputs_.query_lengths, query_.length,
                                   query_lengths_, problem_.query_starts_));
  ATTN_RETURN_IF_ERROR(ReadKeyLengths());
  const bool keys_packed = kv_layout() == TensorLayout::kPacked;
  const bool cached = inputs_.cache != nullptr;
  if (!keys_packed && !cached) padded_kv_len_ = past_length_ + key_.length;
  std::int64_t new_len = keys_packed ? 0 : key_.length;
  for (std::size_t i = 0; i < static_cast<std::size_t>(batch_); ++i) {
    const std::int64_t padded = PastLength(i) + (keys_packed ? kv_lengths_[i] : key_.length);
    q_len_ = std::max(q_len_, query_lengths_[i]);
    kv_len_ = std::max(kv_len_, PastLength(i) + kv_lengths_[i]);
    new_len = std::max(new_len, kv_lengths_[i]);
    padded_kv_len_ = std::max(padded_kv_len_, padded);
  }
  padded_q_len_ = packed ? q_len_ : query_.length;
  // What lies in sessions is bounded by their own budget: the request is what it brings.
  const std::int64_t tokens = std::max(padded_q_len_, cached ? new_len : padded_kv_len_);
  if (tokens > max_tokens_ || batch_ * tokens > max_tokens_) {
    return InvalidField("query",
                        absl::StrCat("batch ", batch_, " times length ", tokens,
                                     " is more than the limit of ", max_tokens_, " tokens"));
  }
  return absl::OkStatus();
}

void ProblemBuilder::MakeSequences() {
  const auto count = static_cast<std::size_t>(batch_);
  const bool packed = inputs_.layout == TensorLayout::kPacked;
  const bool keys_packed = kv_layout() == TensorLayout::kPacked;
  problem_.spans_.reserve(2 * count);  // sequences point into it
  problem_.sequences_.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t row = packed ? 0 : static_cast<std::int64_t>(i);
    const std::int64_t kv_row = keys_packed ? 0 : static_cast<std::int64_t>(i);
    kernels::Sequence& sequence = problem_.sequences_[i];
    sequence.q_len = query_lengths_[i];
    sequence.kv_len = PastLength(i) + kv_lengths_[i];
    sequence.first_query_position = inputs_.first_query_position.empty()
                                        ? sequence.kv_len - sequence.q_len
                                        : inputs_.first_query_position[i];
    sequence.mask_row = static_cast<std::int64_t>(i);
    sequence.query = query_.View(row, problem_.query_starts_[i]);
    sequence.spans = problem_.spans_.data() + problem_.spans_.size();
    if (past_length_ > 0) {
      const auto past_row = static_cast<std::int64_t>(i);
      problem_.spans_.push_back(
          {past_key_.View(past_row, 0), past_value_.View(past_row, 0), past_length_});
    }
    if (inputs_.cache != nullptr) {  // its new tokens, which the cache will hold
      sequence.pages.first_token = inputs_.cache->first_tokens[i];
      problem_.spans_.push_back(
          {key_.View(kv_row, kv_starts_[i]), value_.View(kv_row, kv_starts_[i]), kv_lengths_[i]});
      continue;
    }
    if (kv_lengths_[i] > 0) {
      problem_.spans_.push_back(
          {key_.View(kv_row, kv_starts_[i]), value_.View(kv_row, kv_starts_[i]), kv_lengths_[i]});
    }
    sequence.num_spans = problem_.spans_.data() + problem_.spans_.size() - sequence.spans;
  }
}

void ProblemBuilder::DescribeProblem() {
  kernels::AttentionArgs& args = problem_.args_;
  const DType output_dtype =
      inputs_.output_dtype == DType::kUnspecified ? query_.dtype : inputs_.output_dtype;
  args.dtype = args.kv_dtype = ToElementType(query_.dtype);
  if (inputs_.cache != nullptr) {
    args.paged = true;
    args.kv_dtype = ToElementType(problem_.cache_dims_.dtype);
  }
  args.output_dtype = ToElementType(output_dtype);
  args.num_heads = query_.heads;
  args.num_kv_heads = key_.heads;
  args.head_dim = query_.dim;
  args.value_dim = value_.dim;
  args.stage = inputs_.stage;
  args.sequences = problem_.sequences_.data();
  args.num_sequences = batch_;
  if (!problem_.alibi_slopes_.empty()) args.alibi_slopes = problem_.alibi_slopes_.data();
  if (!problem_.sink_logits_.empty()) args.sink_logits = problem_.sink_logits_.data();
  if (!problem_.padding_mask_.empty()) args.mask.data = problem_.padding_mask_.data();
  AttentionShape& shape = problem_.shape_;
  shape = ShapeOf(args);
  shape.output_lse = inputs_.output_lse;
  shape.ragged = shape.ragged || q_len_ != padded_q_len_;  // all rows may be padded alike
  problem_.padded_q_len_ = padded_q_len_;
}

absl::Status ProblemBuilder::DescribeOutputs() {
  const AttentionShape& shape = problem_.shape_;
  const std::int64_t tokens = query_.length;
  const auto rows = [&](TensorLayout layout, std::int64_t heads, std::int64_t length,
                        std::int64_t dim) {
    switch (layout) {
      case TensorLayout::kPacked:
        return std::vector<std::int64_t>{length, heads, dim};
      case TensorLayout::kTokensFirst:
        return std::vector<std::int64_t>{batch_, length, heads, dim};
      case TensorLayout::kHeadsFirst:
        break;
    }
    return std::vector<std::int64_t>{batch_, heads, length, dim};
  };
  AttentionProblem::Outputs& outputs = problem_.outputs_;
  outputs.output = {shape.output_dtype,
                    rows(inputs_.layout, shape.num_heads, tokens, shape.value_dim)};
  if (shape.stage != kernels::ScoreStage::kNone) {
    outputs.attention_weights = {shape.output_dtype, {batch_, shape.num_heads, q_len_, kv_len_}};
  }
  if (shape.output_lse) {
    outputs.lse = {DType::kFloat32,
                   inputs_.layout == TensorLayout::kPacked
                       ? std::vector<std::int64_t>{tokens, shape.num_heads}
                       : std::vector<std::int64_t>{batch_, shape.num_heads, tokens}};
  }
  if (inputs_.output_present) {
    if (problem_.present_layout_ == TensorLayout::kPacked) {
      return InvalidField("use_cache", "use_cache can't return present in a packed layout");
    }
    outputs.present_key = {
        shape.dtype, rows(problem_.present_layout_, shape.num_kv_heads, kv_len_, shape.head_dim)};
    outputs.present_value = {
        shape.dtype, rows(problem_.present_layout_, shape.num_kv_heads, kv_len_, shape.value_dim)};
  }
  return absl::OkStatus();
}

absl::StatusOr<AttentionProblem> ProblemBuilder::Build() {
  problem_.layout_ = inputs_.layout;
  problem_.present_layout_ = inputs_.present_layout.value_or(inputs_.layout);
  ATTN_RETURN_IF_ERROR(CheckTensors());
  ATTN_RETURN_IF_ERROR(CheckLayer());
  if (inputs_.cache != nullptr) ATTN_RETURN_IF_ERROR(CheckCacheDims());
  ATTN_RETURN_IF_ERROR(CheckPast());
  ATTN_RETURN_IF_ERROR(CheckLengths());
  ATTN_RETURN_IF_ERROR(CheckOptions());
  ATTN_RETURN_IF_ERROR(CheckMask());
  MakeSequences();
  DescribeProblem();
  if (inputs_.cache != nullptr) ATTN_RETURN_IF_ERROR(CheckVisible());
  ATTN_RETURN_IF_ERROR(DescribeOutputs());
  return std::move(problem_);
}

}  // namespace attn
