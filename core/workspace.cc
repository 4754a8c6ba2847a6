#include "core/workspace.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {

absl::Status MemoryMeter::Refusal(std::size_t bytes) const {
  return MakeError(
      absl::StatusCode::kResourceExhausted, "WORKSPACE_LIMIT",
      absl::StrCat("the execution holds ", current_, " bytes of scratch memory and needs ", bytes,
                   " more, but may hold ", limit_));
}

absl::StatusOr<void*> Workspace::Take(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  if (!meter_.Allows(bytes)) return meter_.Refusal(bytes);
  // The smallest free block that fits without wasting more than half of it.
  Block* best = nullptr;
  for (Block& block : blocks_) {
    if (block.taken || block.buffer.bytes < bytes || block.buffer.bytes / 2 > bytes) continue;
    if (best == nullptr || block.buffer.bytes < best->buffer.bytes) best = &block;
  }
  if (best == nullptr) {
    ATTN_ASSIGN_OR_RETURN(Buffer buffer, device_.Allocate(bytes));
    best = &blocks_.emplace_back(Block{std::move(buffer), false});
  }
  best->taken = true;
  meter_.Add(bytes);
  return best->buffer.data.get();
}

void Workspace::Reset() {
  // What this execution used is the best guess of what the next one needs: the rest goes first when
  // memory is over the limit of what is kept.
  std::stable_sort(blocks_.begin(), blocks_.end(),
                   [](const Block& a, const Block& b) { return a.taken && !b.taken; });
  std::size_t kept = 0;
  std::size_t count = 0;
  while (count < blocks_.size() && kept + blocks_[count].buffer.bytes <= keep_bytes_) {
    kept += blocks_[count].buffer.bytes;
    blocks_[count].taken = false;
    ++count;
  }
  blocks_.resize(count);
  meter_.Reset();
}

}  // namespace attn
