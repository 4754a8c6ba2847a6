// A CPU device with a workspace, and work on its driver: what tests of core share.
#pragma once

#include <memory>

#include "core/attention_implementation.h"
#include "core/device.h"
#include "core/workspace.h"

namespace attn {

class TestDevice {
 public:
  explicit TestDevice(int threads = 2, std::size_t workspace_limit = std::size_t{1} << 30)
      : device_(CreateCpuDevice(Executor::Options{threads, 20, nullptr})),
        workspace_(*device_, workspace_limit, std::size_t{16} << 20) {}

  Device& device() { return *device_; }
  Workspace& workspace() { return workspace_; }

  // Runs `body(context)` on the driver, with a fresh count of the workspace.
  template <typename Body>
  void Execute(Body body) {
    device_->executor().Run([&] {
      workspace_.Reset();
      ExecutionContext context{*device_, workspace_, nullptr};
      body(context);
    });
  }

 private:
  std::unique_ptr<Device> device_;
  Workspace workspace_;
};

}  // namespace attn
