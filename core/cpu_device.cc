#include <cstring>

#include "absl/strings/str_cat.h"
#include "core/device.h"
#include "core/torch_threads.h"
#include "kernels/cpu/isa.h"

namespace attn {
namespace {

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(const Executor::Options& options)
      : backend_(absl::StrCat("cpu/", kernels::cpu::ActiveIsa().name)), executor_(options) {}

  const std::string& name() const override { return name_; }
  std::string backend() const override { return backend_; }

  absl::StatusOr<Buffer> Allocate(std::size_t bytes) override { return AllocateHostMemory(bytes); }

  void Copy(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void Fill(void* to, int byte, std::size_t bytes) override {
    if (bytes > 0) std::memset(to, byte, bytes);
  }
  void Synchronize() override {}

  Executor& executor() override { return executor_; }

 private:
  const std::string name_ = "cpu:0";
  const std::string backend_;
  Executor executor_;
};

}  // namespace

std::unique_ptr<Device> CreateCpuDevice(const Executor::Options& options) {
  Executor::Options configured = options;
  configured.on_driver_start = [hook = options.on_driver_start](int threads) {
    ConfigureTorchThread(threads);
    if (hook) hook(threads);
  };
  return std::make_unique<CpuDevice>(configured);
}

}  // namespace attn
