// A device's own limits, measured in a few milliseconds: what the cost model divides by. Benchmarks
// measure the same more carefully (bench/limits.h).
#pragma once

#include "core/device.h"

namespace attn {

struct Peaks {
  double operations_per_second = 0.0;  // of float32, all units together
  double bytes_per_second = 0.0;       // read from memory that no cache holds
};

// Takes about 30 ms. On the driver of the device's executor only. Zeros where memory for it can't
// be had.
Peaks MeasurePeaks(Device& device);

}  // namespace attn
