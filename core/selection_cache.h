// Answers of the selector by shape, so that a request does not pay for the model: a key is the
// kind of work exactly and its extents to within an eighth of an octave. Safe from several threads.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "core/attention_implementation.h"

namespace attn {

struct SelectionKey {
  std::array<std::int32_t, 30> values = {};

  friend bool operator==(const SelectionKey&, const SelectionKey&) = default;
};

SelectionKey SelectionKeyOf(const AttentionShape& shape, bool allow_approximate);

struct CachedSelection {
  const ImplementationRow* row = nullptr;
  std::string reason;
  std::uint64_t workspace_bytes = 0;
  // The least that was too much for an implementation that would have been better; 0: none was.
  std::uint64_t refused_bytes = 0;
};

class SelectionCache {
 public:
  // `version`: of what answers are derived from; those of another one are forgotten.
  std::optional<CachedSelection> Find(const SelectionKey& key, std::uint64_t version) const;
  void Store(const SelectionKey& key, std::uint64_t version, CachedSelection selection);

 private:
  struct Hash {
    std::size_t operator()(const SelectionKey& key) const;
  };

  mutable std::mutex mutex_;
  std::unordered_map<SelectionKey, CachedSelection, Hash> answers_;
  std::uint64_t version_ = 0;
};

}  // namespace attn
