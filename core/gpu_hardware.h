// NVIDIA GPUs as the CUDA driver describes them. The driver's library is opened at run time, so
// that the server is the same program on machines that have none.
#pragma once

#include <vector>

#include "core/hardware.h"

namespace attn {

// Every GPU that the driver lets this process use; none without a driver. Reads it anew: free
// memory changes. The first call starts the driver; each makes a context on every GPU for as long
// as it takes to ask for its free memory, which a GPU in use answers in microseconds and an idle
// one in a fraction of a second. `library`: tests name another one.
std::vector<GpuHardware> DescribeGpus(const char* library = "libcuda.so.1");

}  // namespace attn
