// Rows out of a cache's pages, for implementations that read nothing else. Keys that no query can
// see by position are left out where that changes nothing else (TrimmedKeys).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "core/attention_implementation.h"

namespace attn {

class PlainRows {
 public:
  // A problem without pages is taken as it is. Otherwise keys and values are unpacked into the
  // context's workspace, in the query's dtype where the cache has the same one and in float32 where
  // it has not. RESOURCE_EXHAUSTED. `args` outlives this.
  static absl::StatusOr<PlainRows> Create(const kernels::AttentionArgs& args,
                                          const AttentionShape& shape, ExecutionContext& context);

  const kernels::AttentionArgs& args() const { return args_; }
  const AttentionShape& shape() const { return shape_; }

  // Workspace that Create takes for a problem of this shape.
  static std::uint64_t WorkspaceBytes(const AttentionShape& shape);

 private:
  PlainRows() = default;
  // The first token that is to be unpacked.
  std::int64_t AddRow(const kernels::Sequence& sequence, char* memory, std::int64_t& at);

  kernels::AttentionArgs args_;
  AttentionShape shape_;
  std::vector<kernels::Sequence> sequences_;
  std::vector<kernels::KeyValueSpan> spans_;
};

}  // namespace attn
