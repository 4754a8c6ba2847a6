// What executions of each implementation took on this machine: benchmarks record it, the selector
// corrects its cost model by it. Safe from several threads.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "core/attention_implementation.h"

namespace attn {

struct MeasuredTiming {
  std::string implementation;
  AttentionShape shape;
  double seconds = 0.0;  // median of an execution
};

class MeasuredTimings {
 public:
  // A later measurement of the same implementation and shape replaces the earlier one.
  void Record(MeasuredTiming timing);
  std::vector<MeasuredTiming> All() const;

  // Counts Record calls: who keeps something derived from the timings sees that it is out of date.
  std::uint64_t version() const;

 private:
  mutable std::mutex mutex_;
  std::vector<MeasuredTiming> timings_;
  std::uint64_t version_ = 0;
};

}  // namespace attn
