// What a client knows of one session's caches without asking: each layer's length, the number of
// its last call, and whether that call is in doubt. Sends nothing.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>

#include "absl/status/statusor.h"
#include "client/cpp/calls.h"

namespace attn::client {

class CacheRecord {
 public:
  // One row's fields of a SessionBatch.
  struct Row {
    uint64_t step = 0;      // 0: none, of a call that changes nothing
    int64_t truncate = -1;  // -1: no cut
  };

  // For a new call, whose caller wants to cut at `truncate` (-1: not). Where the last call is in
  // doubt, the cut takes back what that one may have appended; the number rises all the same, so
  // that the server refuses a copy of it that comes late. OUT_OF_RANGE for a cut beyond the cache,
  // which only what is in doubt could fill. INVALID_ARGUMENT where the session's layers are named
  // with a stack in one call and without in another: two names of one layer would be two records.
  absl::StatusOr<Row> Next(const Layer& layer, CacheMode mode, int64_t truncate);

  // How the call ended for which Next gave `row`. One that was refused needs neither: nothing has
  // changed. `length` is the cache's own.
  void Succeeded(const Layer& layer, CacheMode mode, int64_t length);
  void Lost(const Layer& layer, CacheMode mode, const Row& row);

  int64_t length(const Layer& layer) const;

  // Of a fork that shares `length` tokens of each self-attention layer; unset: all.
  CacheRecord Fork(std::optional<int64_t> length) const;

 private:
  struct Entry {
    uint64_t step = 0;
    int64_t length = 0;
    bool in_doubt = false;
  };
  using Key = std::tuple<std::string, uint32_t, bool>;  // stack, layer, cross

  static Key KeyOf(const Layer& layer) { return {layer.stack, layer.index, layer.cross}; }

  std::map<Key, Entry> entries_;
  std::optional<bool> names_stack_;  // known from the first call that the server may have executed
};

}  // namespace attn::client
