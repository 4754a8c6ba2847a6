// What this process may use of the machine it runs on, under the limits of its control group.
#pragma once

#include <cstdint>
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

}  // namespace attn
