#include "core/session.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/checked_math.h"
#include "core/error.h"
#include "core/page_table.h"

namespace attn {
namespace {

constexpr std::uint64_t kDefaultRollbackTokens = 64;
// Beyond any cache: keeps sums small.
constexpr std::uint64_t kMaxTokens = std::uint64_t{1} << 40;

// Blocks for `tokens` in every self-attention layer, and one more to copy what a retry replaces.
std::uint64_t ReserveBytes(const HostedModel& model, DType dtype, std::uint64_t tokens) {
  const auto blocks = static_cast<std::uint64_t>(BlocksOf(static_cast<std::int64_t>(tokens)));
  std::uint64_t bytes = 0;
  std::uint64_t largest = 0;
  for (const LayerStack& stack : model.spec().stacks) {
    for (const LayerSpec& run : stack.self_attention) {
      const std::uint64_t block = BlockBytes(DimsOf(run, dtype));
      const std::uint64_t layer = SaturatingMultiply(block, blocks);
      bytes = SaturatingAdd(bytes, SaturatingMultiply(layer, run.repeat));
      largest = std::max(largest, block);
    }
  }
  return SaturatingAdd(bytes, largest);
}

}  // namespace

Session::Session(std::string id, std::shared_ptr<ManagerPool> pool,
                 std::shared_ptr<CachePool> cache, const SessionOptions& options,
                 SessionClock::time_point now)
    : id_(std::move(id)),
      pool_(std::move(pool)),
      cache_(std::move(cache)),
      time_to_live_seconds_(options.time_to_live_seconds),
      rollback_tokens_(static_cast<std::int64_t>(
          options.rollback_tokens == 0 ? kDefaultRollbackTokens
                                       : std::min(options.rollback_tokens, kMaxTokens))),
      opened_(now),
      dtype_(options.cache_dtype),
      last_used_(now) {}

absl::StatusOr<std::shared_ptr<Session>> Session::Create(std::string id,
                                                         std::shared_ptr<ManagerPool> pool,
                                                         std::shared_ptr<CachePool> cache,
                                                         const SessionOptions& options,
                                                         SessionClock::time_point now) {
  SessionOptions complete = options;
  const HostedModel* const model = pool->model();
  if (complete.cache_dtype == DType::kUnspecified && model != nullptr) {
    const ModelSpec& spec = model->spec();
    complete.cache_dtype = spec.cache_dtype == DType::kUnspecified ? spec.dtype : spec.cache_dtype;
  }
  const DType dtype = complete.cache_dtype;
  ATTN_RETURN_IF_ERROR(CheckCacheDType("cache_dtype", dtype));
  std::shared_ptr<CacheReserve> reserve;
  if (options.reserve_tokens > 0) {
    if (model == nullptr) {
      return InvalidField("reserve_tokens",
                          "reserve_tokens can't be set without a model, whose dimensions it needs");
    }
    if (options.reserve_tokens > kMaxTokens) {
      return InvalidField(
          "reserve_tokens",
          absl::StrCat("reserve_tokens is ", options.reserve_tokens, ", more than ", kMaxTokens));
    }
    ATTN_ASSIGN_OR_RETURN(reserve,
                          cache->Reserve(ReserveBytes(*model, dtype, options.reserve_tokens)));
  }
  auto session = std::shared_ptr<Session>(
      new Session(std::move(id), std::move(pool), std::move(cache), complete, now));
  session->reserve_ = std::move(reserve);
  return session;
}

Session::~Session() { cache_->ReturnTables(table_bytes_); }

std::uint64_t Session::TableBytes(const LayerCache& layer) {
  constexpr std::uint64_t kNodeBytes = 256;  // of the map of layers, its key included
  return kNodeBytes + layer.blocks.size() * sizeof(BlockRef);
}

absl::Status Session::ChargeTable(std::uint64_t bytes) {
  ATTN_RETURN_IF_ERROR(cache_->ChargeTables(bytes));
  table_bytes_ += bytes;
  return absl::OkStatus();
}

std::int64_t Session::WindowOf(const CacheKey& key) const {
  if (pool_->model() == nullptr) return -1;
  const auto layer = pool_->model()->Find({pool_->name(), key.stack, key.layer, key.kind});
  return layer.ok() ? LayerWindow(**layer, key.kind) : -1;
}

absl::StatusOr<std::shared_ptr<Session>> Session::Fork(std::string id,
                                                       std::optional<std::int64_t> length,
                                                       SessionClock::time_point now) const {
  SessionOptions options;
  options.time_to_live_seconds = time_to_live_seconds_;
  options.rollback_tokens = static_cast<std::uint64_t>(rollback_tokens_);
  options.cache_dtype = dtype_;
  auto fork = std::shared_ptr<Session>(new Session(std::move(id), pool_, cache_, options, now));
  for (const auto& [key, layer] : layers_) {
    const bool whole = !length || key.kind == AttentionKind::kCross;
    const std::int64_t tokens = whole ? layer.length : std::min(*length, layer.length);
    const std::int64_t first = std::min(layer.first_token, tokens);
    const std::int64_t window = WindowOf(key);
    const std::int64_t seen = window < 0 ? 0 : std::max<std::int64_t>(tokens - window, 0);
    if (first > seen) {
      return MakeError(
          absl::StatusCode::kOutOfRange, "TOKENS_LET_GO",
          absl::StrCat("a fork at length ", tokens, " would see tokens from ", seen, " of layer ",
                       key.layer, ", whose window has let go of those before ", layer.first_token),
          {{"length", absl::StrCat(layer.length)},
           {"first_position", absl::StrCat(layer.first_token)}});
    }
    LayerCache copy;
    copy.dims = layer.dims;
    copy.blocks.assign(layer.blocks.begin(), layer.blocks.begin() + BlocksOf(tokens));
    copy.held_blocks =
        std::count_if(copy.blocks.begin(), copy.blocks.end(),
                      [](const BlockRef& block) { return static_cast<bool>(block); });
    copy.length = copy.call_start = copy.call_query = tokens;
    copy.first_token = first;
    copy.last_step = layer.last_step;
    ATTN_RETURN_IF_ERROR(fork->ChargeTable(TableBytes(copy)));
    fork->layers_.emplace(key, std::move(copy));
  }
  return fork;
}

std::vector<Session::LayerState> Session::Layers() const {
  std::lock_guard lock(mutex_);
  std::vector<LayerState> states;
  for (const auto& [key, layer] : layers_) {
    if (!layer.dims.known()) continue;
    states.push_back({key, layer.length, layer.first_token, layer.last_step});
  }
  return states;
}

std::uint64_t Session::bytes() const {
  std::lock_guard lock(mutex_);
  std::uint64_t bytes = 0;
  for (const auto& [key, layer] : layers_) {
    if (layer.held_blocks == 0) continue;
    bytes += static_cast<std::uint64_t>(layer.held_blocks) * BlockBytes(layer.dims);
  }
  return bytes;
}

std::int64_t Session::longest_layer() const {
  std::lock_guard lock(mutex_);
  std::int64_t longest = 0;
  for (const auto& [key, layer] : layers_) longest = std::max(longest, layer.length);
  return longest;
}

bool Session::BeginUse() {
  std::lock_guard lock(mutex_);
  if (closed_) return false;
  ++in_use_;
  return true;
}

void Session::EndUse(SessionClock::time_point now) {
  Contents freed;
  std::lock_guard lock(mutex_);
  last_used_ = std::max(last_used_, now);
  if (--in_use_ == 0 && closed_) freed = TakeContents();
}

void Session::Touch(SessionClock::time_point now) {
  std::lock_guard lock(mutex_);
  last_used_ = std::max(last_used_, now);
}

double Session::IdleSeconds(SessionClock::time_point now) const {
  if (in_use_ > 0) return 0.0;
  return std::max(0.0, std::chrono::duration<double>(now - last_used_).count());
}

double Session::idle_seconds(SessionClock::time_point now) const {
  std::lock_guard lock(mutex_);
  return IdleSeconds(now);
}

bool Session::EndIfExpired(SessionClock::time_point now) {
  std::lock_guard lock(mutex_);
  const bool expired = IdleSeconds(now) > time_to_live_seconds_;
  closed_ = closed_ || expired;
  return expired;
}

double Session::age_seconds(SessionClock::time_point now) const {
  return std::max(0.0, std::chrono::duration<double>(now - opened_).count());
}

bool Session::Expired(SessionClock::time_point now) const {
  return idle_seconds(now) > time_to_live_seconds_;
}

Session::Contents Session::TakeContents() {
  cache_->ReturnTables(std::exchange(table_bytes_, 0));
  return {std::exchange(layers_, {}), std::exchange(reserve_, nullptr)};
}

void Session::Close() {
  Contents freed;  // outside the lock
  std::lock_guard lock(mutex_);
  closed_ = true;
  if (in_use_ == 0) freed = TakeContents();
}

bool Session::closed() const {
  std::lock_guard lock(mutex_);
  return closed_;
}

}  // namespace attn
