// Measured timings over restarts: a small JSON file that holds for one kind of hardware and one
// version alone. On other hardware, or by other kernels, they would mislead the selector.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/measured_timings.h"

namespace attn {

struct TimingsKey {
  std::string hardware;  // "Intel(R) Xeon(R) ..., avx512, 8 threads"
  std::string version;   // of the server
};

// The CPU that this process runs on, with the instruction set in use and its device's threads.
std::string DescribeTimingsHardware(int threads);

// Records what the file holds; how many timings that were. NOT_FOUND where there is no file;
// FAILED_PRECONDITION (reason TIMINGS_OF_ANOTHER) for one of other hardware or another version;
// INVALID_ARGUMENT (reason BROKEN_TIMINGS) for one that is not what SaveTimings wrote. Then nothing
// is recorded.
absl::StatusOr<std::size_t> LoadTimings(const std::string& path, const TimingsKey& key,
                                        MeasuredTimings& timings);

// Replaces the file at once: a reader, or a crash, sees the old or the new one. The last 4,096
// timings are kept. INTERNAL (reason TIMINGS_NOT_WRITTEN).
absl::Status SaveTimings(const std::string& path, const TimingsKey& key,
                         const MeasuredTimings& timings);

}  // namespace attn
