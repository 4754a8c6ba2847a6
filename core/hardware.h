// What this process may use of the machine it runs on, under the limits of its control group.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace attn {

struct CpuHardware {
  std::string model;
  int cores = 1;  // that this process may use: affinity and the control group's quota
  std::uint64_t memory_bytes = 0;     // under the control group's limit
  std::uint64_t available_bytes = 0;  // now
  std::vector<std::string> features;  // instruction sets that kernels can use, best first
  std::string active;                 // the one in use
};

// Reads it anew: available memory and limits change.
CpuHardware DescribeCpu();

// Host memory that this process can still have: under the control group's limit, where the page
// cache counts as free, because it gives way. About 0.1 ms.
std::uint64_t AvailableHostBytes();

struct GpuHardware {
  std::string name;
  int major = 0;  // compute capability
  int minor = 0;
  bool tensor_cores = false;
  std::uint64_t memory_bytes = 0;
  std::uint64_t free_bytes = 0;  // now
  int multiprocessors = 0;
};

struct HardwareDescription {
  CpuHardware cpu;
  std::vector<GpuHardware> gpus;
};

// Where descriptions come from: the machine, or what a test puts in its place.
class HardwareSource {
 public:
  virtual ~HardwareSource() = default;
  virtual HardwareDescription Describe() const = 0;  // anew; GPUs may take a moment
  virtual std::string ActiveIsa() const = 0;         // as CpuHardware::active
  virtual std::uint64_t AvailableBytes() const = 0;  // of the host, now
};

// The machine that this process runs on.
std::shared_ptr<const HardwareSource> SystemHardware();

}  // namespace attn
