// Rotary embedding of a call's projected queries and keys, in place, over the device's cores.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "core/attention_implementation.h"
#include "core/rotary.h"
#include "core/token_positions.h"

namespace attn {

// Heads that lie side by side in each row: queries, then keys.
struct ProjectedHeads {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t row_stride = 0;  // elements
  std::int64_t heads = 0;       // to rotate, from the start of a row
  std::int64_t head_dim = 0;
};

// Scratch memory is the workspace's. On the executor's driver.
absl::Status EncodePositions(const Rotary& rotary, const TokenPositions& positions,
                             const ProjectedHeads& heads, ExecutionContext& context);

// What EncodePositions takes of the workspace.
std::uint64_t PositionWorkspaceBytes(const Rotary& rotary, int workers);

}  // namespace attn
