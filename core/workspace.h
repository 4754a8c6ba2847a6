// Scratch memory of executions, which run one after the other on a device: blocks are handed out
// 64-byte aligned, kept for the next execution, and counted.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/status/statusor.h"
#include "core/device.h"

namespace attn {

// Bytes held now, and the most that were held at once. What a library allocates by itself during an
// execution is counted here too (core/torch_support.h).
class MemoryMeter {
 public:
  void Add(std::size_t bytes) {
    current_ += bytes;
    if (current_ > peak_) peak_ = current_;
  }
  // A block may outlive the execution that it was counted in.
  void Remove(std::size_t bytes) { current_ -= bytes < current_ ? bytes : current_; }
  void Reset() { current_ = peak_ = 0; }
  std::size_t current() const { return current_; }
  std::size_t peak() const { return peak_; }

 private:
  std::size_t current_ = 0;
  std::size_t peak_ = 0;
};

class Workspace {
 public:
  // An execution may hold `limit_bytes`; `keep_bytes` of them stay allocated between executions, so
  // that steady traffic meets no page faults.
  Workspace(Device& device, std::size_t limit_bytes, std::size_t keep_bytes)
      : device_(device), limit_bytes_(limit_bytes), keep_bytes_(keep_bytes) {}

  // Uninitialised, valid until the next Reset. RESOURCE_EXHAUSTED (reason WORKSPACE_LIMIT) beyond
  // the limit.
  absl::StatusOr<void*> Take(std::size_t bytes);

  // Takes back everything that was handed out and starts a new count.
  void Reset();

  MemoryMeter& meter() { return meter_; }
  std::size_t limit_bytes() const { return limit_bytes_; }

 private:
  struct Block {
    Buffer buffer;
    bool taken = false;
  };

  Device& device_;
  const std::size_t limit_bytes_;
  const std::size_t keep_bytes_;
  std::vector<Block> blocks_;
  std::size_t used_bytes_ = 0;
  MemoryMeter meter_;
};

}  // namespace attn
