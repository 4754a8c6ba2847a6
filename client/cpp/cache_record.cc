#include "client/cpp/cache_record.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace attn::client {

absl::StatusOr<CacheRecord::Row> CacheRecord::Next(const Layer& layer, CacheMode mode,
                                                   int64_t truncate) {
  if (names_stack_ && *names_stack_ == layer.stack.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "layer.stack is \"", layer.stack, "\"; this session's calls name a stack always or never"));
  }
  Entry& entry = entries_[KeyOf(layer)];
  Row row{0, truncate};
  if (entry.in_doubt) {
    if (truncate > entry.length) {
      return absl::OutOfRangeError(
          absl::StrCat("truncate is ", truncate, ", beyond the cache's ", entry.length, " tokens"));
    }
    if (truncate < 0) row.truncate = entry.length;
  }
  if (mode == CacheMode::kAppend) row.step = ++entry.step;
  return row;
}

void CacheRecord::Succeeded(const Layer& layer, CacheMode mode, int64_t length) {
  names_stack_ = !layer.stack.empty();
  if (mode != CacheMode::kAppend) return;
  Entry& entry = entries_[KeyOf(layer)];
  entry.length = length;
  entry.in_doubt = false;
}

void CacheRecord::Lost(const Layer& layer, CacheMode mode, const Row& row) {
  if (mode != CacheMode::kAppend) return;
  names_stack_ = !layer.stack.empty();
  Entry& entry = entries_[KeyOf(layer)];
  if (row.truncate >= 0) entry.length = std::min(entry.length, row.truncate);
  entry.in_doubt = true;
}

int64_t CacheRecord::length(const Layer& layer) const {
  const auto found = entries_.find(KeyOf(layer));
  return found == entries_.end() ? 0 : found->second.length;
}

CacheRecord CacheRecord::Fork(std::optional<int64_t> length) const {
  CacheRecord fork = *this;
  for (auto& [key, entry] : fork.entries_) {
    const bool cross = std::get<bool>(key);
    if (length && !cross) entry.length = std::min(entry.length, *length);
  }
  return fork;
}

}  // namespace attn::client
