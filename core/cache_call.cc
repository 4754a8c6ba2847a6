#include "core/cache_call.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/page_table.h"

namespace attn {
namespace {

// Where the request's lists lie, for messages.
constexpr char kSessions[] = "past_key_value.sessions";

absl::Status CheckList(const char* name, std::size_t size, std::size_t rows) {
  if (size == 0 || size == rows) return absl::OkStatus();
  const std::string field = absl::StrCat(kSessions, ".", name);
  return InvalidField(field,
                      absl::StrCat(field, " has ", size, " entries for ", rows, " sessions"));
}

template <typename T>
T Entry(const std::vector<T>& list, std::size_t row, T fallback) {
  return list.empty() ? fallback : list[row];
}

// Of a row's cache, which has `length` tokens and `step` as its last step.
absl::Status RowError(absl::StatusCode code, const char* reason, std::size_t row,
                      std::int64_t length, std::uint64_t step, const std::string& what) {
  return MakeError(
      code, reason,
      absl::StrCat(what, "; row ", row, "'s cache has length ", length, " and step ", step),
      {{"row", absl::StrCat(row)}, {"length", absl::StrCat(length)}, {"step", absl::StrCat(step)}});
}

}  // namespace

absl::StatusOr<std::shared_ptr<CacheCall>> CacheCall::Create(
    std::vector<std::shared_ptr<Session>> sessions, const CacheKey& key, const HostedLayer* layer,
    const CacheRequest& request) {
  ATTN_RETURN_IF_ERROR(CheckList("truncate", request.truncate.size(), sessions.size()));
  ATTN_RETURN_IF_ERROR(CheckList("cache_position", request.cache_position.size(), sessions.size()));
  ATTN_RETURN_IF_ERROR(CheckList("step", request.step.size(), sessions.size()));
  if (layer == nullptr && (!key.stack.empty() || key.layer >= kMaxLayersWithoutModel)) {
    const char* const field = key.stack.empty() ? "layer.layer" : "layer.stack";
    return InvalidField(field, absl::StrCat("sessions without a model have layers below ",
                                            kMaxLayersWithoutModel, " and no stacks"));
  }
  auto call = std::shared_ptr<CacheCall>(
      new CacheCall(key, request.mode, layer == nullptr ? -1 : LayerWindow(*layer, key.kind)));
  if (layer != nullptr) call->rows_.dims = DimsOf(*layer->spec, DType::kUnspecified);
  for (std::shared_ptr<Session>& session : sessions) {
    ATTN_RETURN_IF_ERROR(call->AddRow(std::move(session), request));
  }
  return call;
}

absl::Status CacheCall::CheckDims(const Session& session, const LayerCache* layer) {
  const std::size_t row = planned_.size();
  const auto differ = [&](const std::string& what) {
    const std::string field = absl::StrCat(kSessions, ".session_ids");
    return InvalidField(field, absl::StrCat("the cache of row ", row, " ", what,
                                            ", unlike that of an earlier row"));
  };
  if (rows_.dims.dtype == DType::kUnspecified) {
    rows_.dims.dtype = session.dtype_;
  } else if (session.dtype_ != rows_.dims.dtype && session.dtype_ != DType::kUnspecified) {
    return differ(absl::StrCat("is ", DTypeName(session.dtype_)));
  }
  if (layer == nullptr || !layer->dims.known()) {
    if (rows_.mode != CacheMode::kReadOnly || !session.model().empty()) return absl::OkStatus();
    return MakeError(absl::StatusCode::kFailedPrecondition, "CACHE_NEVER_USED",
                     absl::StrCat("row ", row, "'s session has no model, and its layer ",
                                  key_.layer, " never held tokens: there is nothing to read"),
                     {{"row", absl::StrCat(row)}});
  }
  const CacheDims& dims = layer->dims;
  if (!rows_.dims.known()) {
    rows_.dims = dims;
  } else if (dims.num_kv_heads != rows_.dims.num_kv_heads || dims.head_dim != rows_.dims.head_dim ||
             dims.value_dim != rows_.dims.value_dim) {
    return differ("has other heads or dimensions");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::int64_t> CacheCall::Start(const Row& row, std::size_t index,
                                              const CacheRequest& request) const {
  static const LayerCache kEmpty;
  const LayerCache& layer = row.layer == nullptr ? kEmpty : *row.layer;
  const auto error = [&](absl::StatusCode code, const char* reason, const std::string& what) {
    return RowError(code, reason, index, layer.length, layer.last_step, what);
  };
  std::int64_t start = layer.length;
  if (row.step != 0) {
    if (rows_.mode != CacheMode::kAppend) {
      return InvalidField(absl::StrCat(kSessions, ".step"),
                          "step is set, but the call does not change the cache");
    }
    const bool retry = row.step == layer.last_step && layer.retryable;
    if (!retry && row.step <= layer.last_step) {
      return error(absl::StatusCode::kAborted, "LATE_STEP",
                   absl::StrCat("step ", row.step, " is late"));
    }
    if (retry) start = layer.call_start;
  }
  const std::int64_t cut = Entry<std::int64_t>(request.truncate, index, -1);
  if (cut < -1) {
    return InvalidField(
        absl::StrCat(kSessions, ".truncate"),
        absl::StrCat("truncate has an entry of ", cut, ", but must be -1 (no cut) or a length"));
  }
  if (cut > start) {
    return error(absl::StatusCode::kOutOfRange, "TRUNCATE_BEYOND",
                 absl::StrCat("truncate is ", cut, ", which is beyond the cache"));
  }
  if (cut >= 0) start = cut;
  const std::int64_t position = Entry<std::int64_t>(request.cache_position, index, -1);
  if (position < -1) {
    return InvalidField(absl::StrCat(kSessions, ".cache_position"),
                        absl::StrCat("cache_position has an entry of ", position,
                                     ", but must be -1 (unchecked) or a length"));
  }
  if (position >= 0 && position != start) {
    const bool beyond = position > start;
    return error(
        beyond ? absl::StatusCode::kOutOfRange : absl::StatusCode::kAborted,
        beyond ? "CACHE_POSITION_BEYOND" : "CACHE_POSITION_BELOW",
        absl::StrCat("cache_position is ", position, ", but new tokens would go to ", start));
  }
  return start;
}

absl::Status CacheCall::AddRow(std::shared_ptr<Session> session, const CacheRequest& request) {
  const std::size_t index = planned_.size();
  Row row;
  row.step = Entry<std::uint64_t>(request.step, index, 0);
  const auto found = session->layers_.find(key_);
  if (found != session->layers_.end()) row.layer = &found->second;
  ATTN_RETURN_IF_ERROR(CheckDims(*session, row.layer));
  ATTN_ASSIGN_OR_RETURN(row.start, Start(row, index, request));
  row.first_token = row.layer == nullptr ? 0 : std::min(row.layer->first_token, row.start);
  row.session = std::move(session);
  rows_.lengths.push_back(row.start);
  rows_.first_tokens.push_back(row.first_token);
  rows_.cache_lengths.push_back(row.layer == nullptr ? 0 : row.layer->length);
  rows_.cache_first_tokens.push_back(row.layer == nullptr ? 0 : row.layer->first_token);
  planned_.push_back(std::move(row));
  return absl::OkStatus();
}

absl::Status CacheCall::Reserve(absl::Span<const Growth> growth, const CacheDims& dims) {
  rows_.dims = dims;
  for (std::size_t i = 0; i < planned_.size(); ++i) {
    planned_[i].growth = growth[i];
    ATTN_RETURN_IF_ERROR(ReserveRow(planned_[i]));
  }
  if (rows_.mode != CacheMode::kAppend) return absl::OkStatus();
  for (Row& row : planned_) ATTN_RETURN_IF_ERROR(PrepareLayer(row));
  return absl::OkStatus();
}

absl::Status CacheCall::ReserveRow(Row& row) {
  const std::int64_t end = row.start + row.growth.tokens;
  const std::int64_t blocks = BlocksOf(end);
  const std::uint64_t bytes = BlockBytes(rows_.dims);
  row.first_new = BlocksOf(row.start);
  // The block that `start` lies in the middle of is written in place where nobody else has it and
  // no token that this call may have to leave as it was lies behind.
  if (row.start % kBlockTokens != 0 && row.growth.tokens > 0) {
    const std::int64_t index = row.start / kBlockTokens;
    const BlockRef& old = row.layer->blocks[static_cast<std::size_t>(index)];
    const bool in_place =
        rows_.mode == CacheMode::kAppend && row.start == row.layer->length && old.only_owner();
    if (!in_place) {
      ATTN_ASSIGN_OR_RETURN(BlockRef copy,
                            row.session->cache_->AllocateCopy(old, bytes, row.session->reserve_));
      row.first_new = index;
      row.new_blocks.push_back(std::move(copy));
    }
  }
  while (row.first_new + static_cast<std::int64_t>(row.new_blocks.size()) < blocks) {
    ATTN_ASSIGN_OR_RETURN(BlockRef block,
                          row.session->cache_->Allocate(bytes, row.session->reserve_));
    row.new_blocks.push_back(std::move(block));
  }
  row.table.reserve(static_cast<std::size_t>(blocks));
  for (std::int64_t i = 0; i < std::min(row.first_new, blocks); ++i) {
    const BlockRef& block = row.layer->blocks[static_cast<std::size_t>(i)];
    row.table.push_back(block ? block->data() : nullptr);
  }
  for (const BlockRef& block : row.new_blocks) row.table.push_back(block->data());
  return absl::OkStatus();
}

// Has room for what Commit adds, so that it can't fail.
absl::Status CacheCall::PrepareLayer(Row& row) {
  Session& session = *row.session;
  std::lock_guard lock(session.mutex_);
  if (session.layers_.count(key_) == 0) {
    ATTN_RETURN_IF_ERROR(session.ChargeTable(Session::TableBytes({})));
  }
  LayerCache& layer = session.layers_[key_];
  row.layer = &layer;
  const std::size_t blocks = row.table.size();
  if (layer.blocks.capacity() < blocks)
    layer.blocks.reserve(std::max(blocks, 2 * layer.blocks.size()));
  return absl::OkStatus();
}

kernels::PageTable CacheCall::Pages(std::size_t row) const {
  kernels::PageTable pages;
  pages.blocks = planned_[row].table.data();
  pages.head_stride = LayoutOf(rows_.dims).page_bytes();
  pages.first_token = planned_[row].first_token;
  return pages;
}

void* CacheCall::PageOf(std::size_t row, std::int64_t token) const {
  return const_cast<void*>(planned_[row].table[static_cast<std::size_t>(token / kBlockTokens)]);
}

void CacheCall::Commit() {
  if (rows_.mode != CacheMode::kAppend) return;
  for (Row& row : planned_) CommitRow(row);
}

void CacheCall::CommitRow(Row& row) {
  Session& session = *row.session;
  std::lock_guard lock(session.mutex_);
  LayerCache& layer = session.layers_.find(key_)->second;
  const auto kept = static_cast<std::size_t>(std::min(row.first_new, BlocksOf(row.start)));
  for (std::size_t i = kept; i < layer.blocks.size(); ++i)
    layer.held_blocks -= layer.blocks[i] ? 1 : 0;
  layer.blocks.resize(kept);
  for (BlockRef& block : row.new_blocks) layer.blocks.push_back(std::move(block));
  layer.held_blocks += static_cast<std::int64_t>(row.new_blocks.size());
  row.new_blocks.clear();
  layer.length = row.start + row.growth.tokens;
  layer.first_token = row.first_token;
  layer.call_start = row.start;
  layer.call_query = std::min(row.start, row.growth.query_position);
  layer.retryable = row.step != 0;
  layer.last_step = std::max(layer.last_step, row.step);
  if (row.growth.tokens > 0) {
    layer.dims = rows_.dims;
    if (session.dtype_ == DType::kUnspecified) session.dtype_ = rows_.dims.dtype;
  }
  if (window_ < 0) return;
  // What neither a retry of this call nor a query after a rollback can see goes, by whole blocks.
  const std::int64_t needed =
      std::min(layer.call_query, layer.length - session.rollback_tokens_) - window_;
  const std::int64_t gone = std::max<std::int64_t>(needed, 0) / kBlockTokens;
  for (std::int64_t i = layer.first_token / kBlockTokens; i < gone; ++i) {
    BlockRef& block = layer.blocks[static_cast<std::size_t>(i)];
    layer.held_blocks -= block ? 1 : 0;
    block = BlockRef();
  }
  layer.first_token = std::max(layer.first_token, gone * kBlockTokens);
}

std::uint64_t CacheCall::appended_tokens() const {
  std::uint64_t tokens = 0;
  if (rows_.mode != CacheMode::kAppend) return tokens;
  for (const Row& row : planned_) tokens += static_cast<std::uint64_t>(row.growth.tokens);
  return tokens;
}

std::vector<std::int64_t> CacheCall::CacheLengths() const {
  std::vector<std::int64_t> lengths;
  for (const Row& row : planned_) {
    const std::int64_t now = row.layer == nullptr ? 0 : row.layer->length;
    const bool appends = rows_.mode == CacheMode::kAppend;
    lengths.push_back(appends ? row.start + row.growth.tokens : now);
  }
  return lengths;
}

}  // namespace attn
