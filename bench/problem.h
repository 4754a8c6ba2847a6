// An attention problem as a serving process would hold it: plain tensors, or keys and values packed
// into the pages of a cache, in memory of the device.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/device.h"
#include "kernels/attention_args.h"

namespace attn::bench {

struct ProblemSpec {
  std::int64_t batch = 1;
  std::int64_t num_heads = 1;
  std::int64_t num_kv_heads = 1;
  std::int64_t q_len = 1;
  std::int64_t kv_len = 1;
  std::int64_t head_dim = 64;
  std::int64_t value_dim = 64;
  bool is_causal = false;   // query i stands at kv_len - q_len + i
  std::string dtype;        // of queries, outputs and the given keys and values
  std::string cache_dtype;  // of pages; empty: plain tensors
  // Caches in turn, one execution after the other: keeps a small one from staying in the CPU's.
  std::int64_t cache_copies = 1;
};

// float32 [batch, heads, length, dim] and the like, contiguous.
struct PlainTensors {
  const void* query = nullptr;
  const void* key = nullptr;
  const void* value = nullptr;
};

class Problem {
 public:
  // Copies (or packs) what is given. INVALID_ARGUMENT for what it can't hold.
  static absl::StatusOr<std::unique_ptr<Problem>> Create(Device& device, const ProblemSpec& spec,
                                                         const PlainTensors& tensors);

  // The arguments of the next execution: each call turns to the next cache.
  const kernels::AttentionArgs& Next();
  // [batch, num_heads, q_len, value_dim], of the query's dtype.
  const Buffer& output() const { return output_; }

 private:
  Problem(Device& device, const ProblemSpec& spec) : device_(device), spec_(spec) {}
  absl::Status CopyTensors(const PlainTensors& tensors);
  absl::Status PackPages(const PlainTensors& tensors);
  void AddArgs(std::int64_t copy);

  Device& device_;
  const ProblemSpec spec_;
  kernels::ElementType dtype_ = kernels::ElementType::kFloat32;
  kernels::ElementType cache_dtype_ = kernels::ElementType::kFloat32;
  Buffer query_, key_, value_, output_;
  std::vector<Buffer> pages_;
  std::vector<const void*> blocks_;  // [copy][sequence][block]
  // Deques: pointers into them stay.
  std::deque<kernels::KeyValueSpan> spans_;
  std::deque<std::vector<kernels::Sequence>> sequences_;
  std::vector<kernels::AttentionArgs> args_;
  std::size_t next_ = 0;
};

}  // namespace attn::bench
