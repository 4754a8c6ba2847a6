// The machine's limits, measured: what a kernel's speed is a share of.
#pragma once

#include <cstdint>
#include <string>

#include "bench/limits_loops.h"
#include "core/device.h"

namespace attn::bench {

// Measures on all threads of the device's executor; never from its driver.
class MachineLimits {
 public:
  explicit MachineLimits(Device& device) : device_(device) {}

  // Operations per second of the best multiply-add loop that this CPU has for the dtype, from about
  // `seconds` of work. float16, and bfloat16 without a dot product of its own, compute as float32.
  double FlopsPerSecond(const std::string& dtype, double seconds);
  static const char* FlopsLoop(const std::string& dtype);

  // Bytes per second of the best plain read loop over memory that no cache holds; which loop that
  // is, is found out when first asked. 0 where the memory can't be had.
  double ReadBytesPerSecond();
  const std::string& read_loop() const { return read_loop_; }

 private:
  bool PrepareReads();
  double TimeReads(const ReadLoop& loop, std::int64_t stride);

  Device& device_;
  Buffer memory_;
  const ReadLoop* best_ = nullptr;
  std::int64_t best_stride_ = 0;
  std::string read_loop_;
};

}  // namespace attn::bench
