#include "tests/core/session_model.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace attn::testing {
namespace {

constexpr std::int64_t kTokens = 64;  // of a block

std::int64_t Blocks(std::int64_t tokens) { return (tokens + kTokens - 1) / kTokens; }

// Keys are padded where their elements lie in pairs or fours, values to 16 columns; int8 has two
// scales for each token.
std::uint64_t BytesOfBlock(const CacheDims& dims) {
  const auto item = static_cast<std::int64_t>(ItemSize(dims.dtype));
  const std::int64_t group = dims.dtype == DType::kInt8       ? 4
                             : dims.dtype == DType::kBFloat16 ? 2
                                                              : 1;
  const std::int64_t key = (dims.head_dim + group - 1) / group * group;
  const std::int64_t scales = dims.dtype == DType::kInt8 ? 2 * 4 : 0;
  const std::int64_t value = (dims.value_dim + 15) / 16 * 16;
  const std::int64_t token = (key + value) * item + scales;
  return static_cast<std::uint64_t>(dims.num_kv_heads * kTokens * token);
}

Outcome Fits(const PlainPool& pool, std::uint64_t bytes) {
  if (pool.used + bytes <= pool.limit) return {};
  return {absl::StatusCode::kResourceExhausted, "CACHE_BUDGET"};
}

const Outcome kInvalid = {absl::StatusCode::kInvalidArgument, "INVALID_FIELD"};
const Outcome kLetGo = {absl::StatusCode::kOutOfRange, "TOKENS_LET_GO"};

// Whether one of `queries` that stand at `position` on sees a key before `first`.
bool SeesBefore(std::int64_t first, std::int64_t position, std::int64_t queries,
                std::int64_t length, const PlainLayerRule& rule) {
  for (std::int64_t at = position; at < position + queries; ++at) {
    for (std::int64_t key = 0; key < std::min(first, length); ++key) {
      const bool hidden =
          (rule.is_causal && key > at) || (rule.window >= 0 && key < at - rule.window);
      if (!hidden) return true;
    }
  }
  return false;
}

}  // namespace

std::string ToText(const Outcome& outcome) {
  return absl::StrCat(absl::StatusCodeToString(outcome.code), " ", outcome.reason);
}

PlainBlock::PlainBlock(PlainPool& owner, std::uint64_t size, std::shared_ptr<PlainReserve> from)
    : pool(owner), bytes(size) {
  ++pool.blocks;
  if (from != nullptr && from->free >= bytes) {
    from->free -= bytes;
    reserve = from;
  } else {
    pool.used += bytes;
  }
}

PlainBlock::~PlainBlock() {
  --pool.blocks;
  if (const std::shared_ptr<PlainReserve> owner = reserve.lock()) {
    owner->free += bytes;
  } else {
    pool.used -= bytes;
  }
}

Outcome SessionModel::Reserve(PlainSession& session, const std::vector<CacheDims>& layers,
                              std::int64_t tokens) {
  std::uint64_t bytes = 0;
  std::uint64_t largest = 0;
  for (CacheDims dims : layers) {
    dims.dtype = session.dtype;
    bytes += BytesOfBlock(dims) * static_cast<std::uint64_t>(Blocks(tokens));
    largest = std::max(largest, BytesOfBlock(dims));
  }
  Outcome fits = Fits(pool_, bytes + largest);
  if (fits.ok()) session.reserve = std::make_shared<PlainReserve>(pool_, bytes + largest);
  return fits;
}

Outcome SessionModel::Fork(const PlainSession& parent, const Rules& rules,
                           std::optional<std::int64_t> length, SessionClock::time_point now,
                           PlainSession& fork) const {
  fork = parent;
  fork.reserve = nullptr;
  fork.last_used = now;
  for (auto& [key, layer] : fork.layers) {
    std::int64_t tokens = layer.length();
    if (length && key.kind == AttentionKind::kSelf) tokens = std::min(tokens, *length);
    const auto found = rules.find(key);
    const PlainLayerRule rule = found == rules.end() ? PlainLayerRule() : found->second;
    // The next query stands behind the last token, and sees itself too.
    const std::int64_t first = std::min(layer.first_token, tokens);
    if (SeesBefore(first, tokens, 1, tokens + 1, rule)) return kLetGo;
    layer.tokens.resize(static_cast<std::size_t>(tokens));
    layer.blocks.resize(static_cast<std::size_t>(Blocks(tokens)));
    layer.first_token = first;
    layer.retryable = false;
    layer.call_start = layer.call_query = tokens;
  }
  return {};
}

Outcome SessionModel::Start(Row& row, std::size_t index, const CacheRequest& request) const {
  static const PlainLayer kEmpty;
  const PlainLayer& layer = row.layer == nullptr ? kEmpty : *row.layer;
  row.start = layer.length();
  const std::uint64_t step = request.step.empty() ? 0 : request.step[index];
  if (step != 0 && request.mode != CacheMode::kAppend) return kInvalid;
  if (step != 0 && step <= layer.last_step) {
    if (step != layer.last_step || !layer.retryable) {
      return {absl::StatusCode::kAborted, "LATE_STEP"};
    }
    row.start = layer.call_start;
  }
  const std::int64_t cut = request.truncate.empty() ? -1 : request.truncate[index];
  if (cut > row.start) return {absl::StatusCode::kOutOfRange, "TRUNCATE_BEYOND"};
  if (cut >= 0) row.start = cut;
  const std::int64_t place = request.cache_position.empty() ? -1 : request.cache_position[index];
  if (place > row.start) return {absl::StatusCode::kOutOfRange, "CACHE_POSITION_BEYOND"};
  if (place >= 0 && place < row.start) return {absl::StatusCode::kAborted, "CACHE_POSITION_BELOW"};
  return {};
}

Outcome SessionModel::CheckRows(const std::vector<PlainSession*>& sessions, const LayerCall& call,
                                const PlainLayerRule& rule, CacheDims& dims,
                                std::vector<Row>& rows) const {
  dims = rule.dims;
  for (std::size_t i = 0; i < sessions.size(); ++i) {
    Row row;
    row.session = sessions[i];
    const auto found = row.session->layers.find(call.key);
    if (found != row.session->layers.end()) row.layer = &found->second;
    const DType dtype = row.session->dtype;
    if (dims.dtype == DType::kUnspecified) dims.dtype = dtype;
    if (dtype != DType::kUnspecified && dtype != dims.dtype) return kInvalid;
    const bool held = row.layer != nullptr && row.layer->dims.known();
    if (!held && row.session->model.empty() && call.request.mode == CacheMode::kReadOnly) {
      return {absl::StatusCode::kFailedPrecondition, "CACHE_NEVER_USED"};
    }
    if (held && !dims.known()) {
      const DType kept = dims.dtype;
      dims = row.layer->dims;
      dims.dtype = kept;
    } else if (held && row.layer->dims.head_dim != dims.head_dim) {
      return kInvalid;  // variants of dimensions all differ in this one
    }
    Outcome start = Start(row, i, call.request);
    if (!start.ok()) return start;
    rows.push_back(std::move(row));
  }
  if (dims.known() && dims.head_dim != call.dims.head_dim) return kInvalid;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto brought = static_cast<std::int64_t>(call.rows[i].ids.size());
    const std::int64_t queries = call.rows[i].queries;
    const std::int64_t length = rows[i].start + brought;
    rows[i].query_position = length - queries;
    const std::int64_t first =
        rows[i].layer == nullptr ? 0 : std::min(rows[i].layer->first_token, rows[i].start);
    if (SeesBefore(first, rows[i].query_position, queries, length, rule)) return kLetGo;
  }
  return {};
}

Outcome SessionModel::Allocate(Row& row, const LayerCall& call, std::size_t index,
                               const CacheDims& dims) {
  const auto brought = static_cast<std::int64_t>(call.rows[index].ids.size());
  const bool append = call.request.mode == CacheMode::kAppend;
  if (row.layer != nullptr) row.blocks = row.layer->blocks;
  row.blocks.resize(static_cast<std::size_t>(Blocks(row.start)));
  // A block that is written to has one owner, and no token that must stay where the call writes.
  if (brought > 0 && row.start % kTokens != 0) {
    const std::shared_ptr<PlainBlock>& last = row.blocks.back();
    const bool alone = last != nullptr && last.use_count() == 2;  // the layer's and this list's
    if (!append || !alone || row.start != row.layer->length()) row.blocks.pop_back();
  }
  while (static_cast<std::int64_t>(row.blocks.size()) < Blocks(row.start + brought)) {
    const std::uint64_t bytes = BytesOfBlock(dims);
    const std::shared_ptr<PlainReserve>& reserve = row.session->reserve;
    if (reserve == nullptr || reserve->free < bytes) {
      Outcome fits = Fits(pool_, bytes);
      if (!fits.ok()) return fits;
    }
    row.blocks.push_back(std::make_shared<PlainBlock>(pool_, bytes, reserve));
  }
  return {};
}

void SessionModel::Publish(Row& row, const LayerCall& call, std::size_t index,
                           const PlainLayerRule& rule, const CacheDims& dims) {
  const RowTokens& brought = call.rows[index];
  PlainLayer& layer = row.session->layers[call.key];
  layer.tokens.resize(static_cast<std::size_t>(row.start));
  layer.tokens.insert(layer.tokens.end(), brought.ids.begin(), brought.ids.end());
  layer.blocks = std::move(row.blocks);
  layer.first_token = std::min(layer.first_token, row.start);
  layer.call_start = row.start;
  layer.call_query = std::min(row.start, row.query_position);
  const std::uint64_t step = call.request.step.empty() ? 0 : call.request.step[index];
  layer.retryable = step != 0;
  layer.last_step = std::max(layer.last_step, step);
  if (!brought.ids.empty()) {
    layer.dims = dims;
    row.session->dtype = dims.dtype;
  }
  if (rule.window < 0) return;
  // The first token that a retry's queries, or one after a rollback, can see.
  const std::int64_t earliest =
      std::min(layer.call_query, layer.length() - row.session->rollback_tokens);
  while (layer.first_token / kTokens * kTokens + kTokens <= earliest - rule.window) {
    const std::int64_t block = layer.first_token / kTokens;
    layer.blocks[static_cast<std::size_t>(block)] = nullptr;
    layer.first_token = (block + 1) * kTokens;
  }
}

Outcome SessionModel::Run(const std::vector<PlainSession*>& sessions, const LayerCall& call,
                          const PlainLayerRule& rule) {
  CacheDims dims;
  std::vector<Row> rows;
  Outcome checked = CheckRows(sessions, call, rule, dims, rows);
  if (!checked.ok()) return checked;
  if (!dims.known()) {
    const DType kept = dims.dtype;
    dims = call.dims;
    dims.dtype = kept;
  }
  if (dims.dtype == DType::kUnspecified) dims.dtype = call.dtype;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    Outcome allocated = Allocate(rows[i], call, i, dims);
    failed_row_ = i;
    if (!allocated.ok()) return allocated;
  }
  if (call.request.mode != CacheMode::kAppend || !call.commit) return {};
  for (std::size_t i = 0; i < rows.size(); ++i) Publish(rows[i], call, i, rule, dims);
  return {};
}

}  // namespace attn::testing
