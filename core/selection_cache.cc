#include "core/selection_cache.h"

#include <bit>
#include <utility>

namespace attn {
namespace {

// About 300 bytes each.
constexpr std::size_t kMostAnswers = 8192;

// Exact up to 16, then eight to the octave.
std::int32_t Bucket(std::int64_t value) {
  if (value < 16) return static_cast<std::int32_t>(value);
  const auto octave = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(value))) - 1;
  const auto eighth = static_cast<std::int32_t>((value >> (octave - 3)) & 7);
  return 16 + 8 * (octave - 4) + eighth;
}

template <typename T>
std::int32_t Exact(T value) {
  return static_cast<std::int32_t>(value);
}

// A share in thousandths; -1: unset.
std::int32_t Share(const std::optional<double>& value) {
  return value ? static_cast<std::int32_t>(*value * 1000.0) : -1;
}

}  // namespace

SelectionKey SelectionKeyOf(const AttentionShape& shape, bool allow_approximate) {
  const std::int64_t first =
      shape.rows.empty() ? shape.kv_len - shape.q_len : shape.rows.front().first_query_position;
  return {{Bucket(shape.batch),
           Bucket(shape.q_len),
           Bucket(shape.kv_len),
           Bucket(shape.pairs),
           Bucket(shape.longest_pairs),
           Bucket(shape.paged_tokens),
           Exact(shape.num_heads),
           Exact(shape.num_kv_heads),
           Exact(shape.head_dim),
           Exact(shape.value_dim),
           first < 0   ? -1
           : first > 0 ? 1
                       : 0,
           Exact(shape.dtype),
           Exact(shape.kv_dtype),
           Exact(shape.output_dtype),
           Exact(shape.paged),
           Exact(shape.ragged),
           Exact(shape.split_keys),
           Exact(shape.is_causal),
           Exact(shape.has_window),
           Bucket(shape.window_left),
           Bucket(shape.window_right),
           Exact(shape.has_soft_cap),
           Exact(shape.has_alibi),
           Exact(shape.has_sinks),
           Exact(shape.mask),
           Exact(shape.stage),
           Exact(shape.output_lse),
           Share(shape.sparsity.factor),
           Share(shape.sparsity.mass),
           Exact(allow_approximate)}};
}

std::size_t SelectionCache::Hash::operator()(const SelectionKey& key) const {
  std::uint64_t hash = 14695981039346656037u;  // FNV-1a over words
  for (const std::int32_t value : key.values) {
    hash = (hash ^ static_cast<std::uint32_t>(value)) * 1099511628211u;
  }
  return static_cast<std::size_t>(hash ^ (hash >> 32));
}

std::optional<CachedSelection> SelectionCache::Find(const SelectionKey& key,
                                                    std::uint64_t version) const {
  std::lock_guard lock(mutex_);
  if (version != version_) return std::nullopt;
  const auto found = answers_.find(key);
  if (found == answers_.end()) return std::nullopt;
  return found->second;
}

void SelectionCache::Store(const SelectionKey& key, std::uint64_t version,
                           CachedSelection selection) {
  std::lock_guard lock(mutex_);
  // Callers are not served in order of age: an answer from before the latest change is dropped.
  if (version < version_) return;
  if (version > version_ || answers_.size() >= kMostAnswers) answers_.clear();
  version_ = version;
  answers_.insert_or_assign(key, std::move(selection));
}

}  // namespace attn
