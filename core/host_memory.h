// Owned memory of the host: tensors that are sent, scratch memory, weights.
#pragma once

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"

namespace attn {

// Memory of a device; freed with the last owner.
struct Buffer {
  std::shared_ptr<void> data;  // 64-byte aligned; null when bytes is 0
  std::size_t bytes = 0;
};

// Uninitialised. Huge pages are asked for where they pay. RESOURCE_EXHAUSTED (reason
// OUT_OF_MEMORY).
absl::StatusOr<Buffer> AllocateHostMemory(std::size_t bytes);

}  // namespace attn
