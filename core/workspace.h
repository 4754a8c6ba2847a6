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
  explicit MemoryMeter(std::size_t limit) : limit_(limit) {}

  void Add(std::size_t bytes) {
    current_ += bytes;
    if (current_ > peak_) peak_ = current_;
  }
  // A block may outlive the execution that it was counted in.
  void Remove(std::size_t bytes) { current_ -= bytes < current_ ? bytes : current_; }
  void Reset() { current_ = peak_ = 0; }
  // Whether `bytes` more are within what an execution may hold.
  bool Allows(std::size_t bytes) const { return bytes <= limit_ && current_ <= limit_ - bytes; }
  // Why it does not allow them: RESOURCE_EXHAUSTED (reason WORKSPACE_LIMIT).
  absl::Status Refusal(std::size_t bytes) const;
  std::size_t limit() const { return limit_; }
  std::size_t current() const { return current_; }
  std::size_t peak() const { return peak_; }

 private:
  const std::size_t limit_;
  std::size_t current_ = 0;
  std::size_t peak_ = 0;
};

// What one worker's part of a block takes, so that the next one's begins on a cache line of its
// own.
constexpr std::size_t RoundUpToLine(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

class Workspace {
 public:
  // An execution may hold `limit_bytes`; `keep_bytes` of them stay allocated between executions, so
  // that steady traffic meets no page faults.
  Workspace(Device& device, std::size_t limit_bytes, std::size_t keep_bytes)
      : device_(device), keep_bytes_(keep_bytes), meter_(limit_bytes) {}

  // Uninitialised, valid until the next Reset. RESOURCE_EXHAUSTED (reason WORKSPACE_LIMIT) beyond
  // the limit.
  absl::StatusOr<void*> Take(std::size_t bytes);

  // Takes back everything that was handed out and starts a new count.
  void Reset();

  MemoryMeter& meter() { return meter_; }

 private:
  struct Block {
    Buffer buffer;
    bool taken = false;
  };

  Device& device_;
  const std::size_t keep_bytes_;
  std::vector<Block> blocks_;
  MemoryMeter meter_;
};

}  // namespace attn
