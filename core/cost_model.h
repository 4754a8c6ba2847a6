// What an execution is going to take: work over the device's peak, traffic over its bandwidth, and
// what each implementation costs beside that (core/hardware_profiles.h), corrected by what was
// measured on this machine near the shape in question. Safe from several threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/attention_implementation.h"
#include "core/hardware_profiles.h"
#include "core/measured_timings.h"
#include "core/peaks.h"

namespace attn {

class CostModel {
 public:
  // The operations of an implementation on a shape; 0 for an unknown name.
  using Operations = std::function<std::uint64_t(const std::string& name, const AttentionShape&)>;

  // `units`: cores or multiprocessors. `timings` may be null, and outlives this.
  CostModel(const HardwareProfile& profile, int units, const MeasuredTimings* timings,
            Operations operations);

  // Replaces the profile's rates; what is far from them (a machine that was busy meanwhile) is cut
  // to a factor of four.
  void SetPeaks(const Peaks& peaks);

  // Seconds for an execution of `operations` by the implementation of that name. Looks at every
  // timing.
  double Estimate(const std::string& implementation, const AttentionShape& shape,
                  std::uint64_t operations) const;

  // Without the correction.
  double Uncorrected(const std::string& implementation, const AttentionShape& shape,
                     std::uint64_t operations) const;

  // Changes when estimates may.
  std::uint64_t version() const;

 private:
  // How far a measurement was from the model, and where.
  struct Point {
    std::string implementation;
    AttentionShape shape;  // without its rows
    double log_ratio = 0.0;
  };

  std::shared_ptr<const std::vector<Point>> Points() const;
  double Correction(const std::string& implementation, const AttentionShape& shape) const;

  const HardwareProfile& profile_;
  const int units_;
  const MeasuredTimings* const timings_;
  const Operations operations_;
  std::atomic<double> operation_rate_;  // of float32, of one unit
  std::atomic<double> byte_rate_;
  std::atomic<std::uint64_t> peaks_version_{0};

  mutable std::mutex mutex_;
  mutable std::uint64_t points_version_ = 0;
  mutable std::shared_ptr<const std::vector<Point>> points_;
};

}  // namespace attn
