// A CPU device with a workspace, and work on its driver: what tests of core share.
#pragma once

#include <memory>

#include "core/attention_implementation.h"
#include "core/device.h"
#include "core/torch_threads.h"
#include "core/workspace.h"

namespace attn {

// An executor of `threads` threads. Under the thread sanitizer LibTorch computes on one of them:
// its OpenMP runtime is not instrumented, and what its threads do would be taken for races. Our own
// pool keeps all threads.
inline Executor::Options TestExecutor(int threads) {
  Executor::Options options{threads, 20, nullptr};
#ifdef __SANITIZE_THREAD__
  options.on_driver_start = [](int) { ConfigureTorchThread(1); };
#endif
  return options;
}

class TestDevice {
 public:
  explicit TestDevice(int threads = 2, std::size_t workspace_limit = std::size_t{1} << 30)
      : device_(CreateCpuDevice(TestExecutor(threads))),
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
