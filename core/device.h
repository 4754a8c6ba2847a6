// Memory and copies of one device, and the executor that owns its cores. The CPU is the first
// device; a GPU is another subclass and not another server. Copies and fills are ordered with the
// device's stream: on the CPU they are done when they return, elsewhere when Synchronize does.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "core/executor.h"
#include "core/host_memory.h"

namespace attn {

class Device {
 public:
  virtual ~Device() = default;

  virtual const std::string& name() const = 0;  // "cpu:0"
  virtual std::string backend() const = 0;      // "cpu/avx512": what kernels run on

  // RESOURCE_EXHAUSTED where the memory can't be had. Uninitialised.
  virtual absl::StatusOr<Buffer> Allocate(std::size_t bytes) = 0;
  virtual void Copy(void* to, const void* from, std::size_t bytes) = 0;
  virtual void Fill(void* to, int byte, std::size_t bytes) = 0;
  virtual void Synchronize() = 0;

  virtual Executor& executor() = 0;
};

// The CPU device of `options.threads` cores, the backend's name being that of the instruction set
// in use.
std::unique_ptr<Device> CreateCpuDevice(const Executor::Options& options);

}  // namespace attn
