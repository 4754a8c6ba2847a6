// What one call does to its sessions, one per batch row, at one layer: all of them change, or none.
// Create checks and looks; Reserve has the memory, after which the kernels' page tables are
// complete and new tokens may be written into them; Commit publishes. Without a Commit nothing has
// changed.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/hosted_model.h"
#include "core/session.h"
#include "kernels/attention_args.h"

namespace attn {

// The API's SessionBatch, without the sessions' names. Lists are empty or have an entry per row.
struct CacheRequest {
  CacheMode mode = CacheMode::kAppend;
  std::vector<std::int64_t> truncate;        // -1: no cut
  std::vector<std::int64_t> cache_position;  // -1: unchecked
  std::vector<std::uint64_t> step;           // 0: no protection
};

class CacheCall {
 public:
  // The sessions' calls run one after the other, and this is their turn until the call is
  // destroyed. `layer` is null without a model. INVALID_ARGUMENT, OUT_OF_RANGE (truncate or
  // cache_position beyond the cache), ABORTED (cache_position below it, a late step),
  // FAILED_PRECONDITION (reading what never held tokens without a model); details "row", "length",
  // "step".
  static absl::StatusOr<std::shared_ptr<CacheCall>> Create(
      std::vector<std::shared_ptr<Session>> sessions, const CacheKey& key, const HostedLayer* layer,
      const CacheRequest& request);

  const CachedRows& rows() const { return rows_; }

  struct Growth {
    std::int64_t tokens = 0;          // that the row brings
    std::int64_t query_position = 0;  // of its first query; tokens' own where it has none
  };
  // Blocks for each row's new tokens, in `dims` (those of rows() where they are known). One that is
  // shared, or holds tokens that this call takes back or cuts, is copied. RESOURCE_EXHAUSTED.
  absl::Status Reserve(absl::Span<const Growth> growth, const CacheDims& dims);

  // A row's pages, new tokens' included. After Reserve.
  kernels::PageTable Pages(std::size_t row) const;
  // The page of KV head 0 that holds the row's token, to be written to.
  void* PageOf(std::size_t row, std::int64_t token) const;

  // Publishes the new lengths, without allocating. Nothing happens in kReadOnly and kDiscard.
  void Commit();

  // That all rows' caches got by Commit.
  std::uint64_t appended_tokens() const;

  // Of each session's own cache, when the call is done: known before Commit, which can't fail.
  std::vector<std::int64_t> CacheLengths() const;

 private:
  struct Row {
    std::shared_ptr<Session> session;
    const LayerCache* layer = nullptr;  // null: none yet
    std::int64_t start = 0;             // tokens that the call builds on
    std::int64_t first_token = 0;
    std::uint64_t step = 0;
    Growth growth;
    std::int64_t first_new = 0;        // index of new_blocks[0]
    std::vector<BlockRef> new_blocks;  // from the one that holds token `start`
    std::vector<const void*> table;
  };

  CacheCall(const CacheKey& key, CacheMode mode, std::int64_t window) : key_(key), window_(window) {
    rows_.mode = mode;
  }
  absl::Status AddRow(std::shared_ptr<Session> session, const CacheRequest& request);
  absl::StatusOr<std::int64_t> Start(const Row& row, std::size_t index,
                                     const CacheRequest& request) const;
  absl::Status CheckDims(const Session& session, const LayerCache* layer);
  absl::Status ReserveRow(Row& row);
  absl::Status PrepareLayer(Row& row);
  void CommitRow(Row& row);

  const CacheKey key_;
  const std::int64_t window_;
  CachedRows rows_;
  std::vector<Row> planned_;
};

}  // namespace attn
