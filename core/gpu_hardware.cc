#include "core/gpu_hardware.h"

#include <dlfcn.h>

#include <array>
#include <cstddef>

namespace attn {
namespace {

// Of cuda.h, which is not needed to build: types and numbers that the driver's ABI fixes.
using CuResult = int;  // 0: success
using CuDevice = int;
using CuContext = void*;
constexpr int kMultiprocessorCount = 16;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;

struct Driver {
  CuResult (*init)(unsigned flags) = nullptr;
  CuResult (*device_count)(int* count) = nullptr;
  CuResult (*device_get)(CuDevice* device, int ordinal) = nullptr;
  CuResult (*device_name)(char* name, int size, CuDevice device) = nullptr;
  CuResult (*device_attribute)(int* value, int attribute, CuDevice device) = nullptr;
  CuResult (*device_memory)(std::size_t* bytes, CuDevice device) = nullptr;
  CuResult (*context_retain)(CuContext* context, CuDevice device) = nullptr;
  CuResult (*context_release)(CuDevice device) = nullptr;
  CuResult (*context_push)(CuContext context) = nullptr;
  CuResult (*context_pop)(CuContext* context) = nullptr;
  CuResult (*memory_info)(std::size_t* free, std::size_t* total) = nullptr;
};

template <typename Function>
bool Load(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool LoadAll(void* library, Driver& driver) {
  return Load(library, "cuInit", driver.init) &&
         Load(library, "cuDeviceGetCount", driver.device_count) &&
         Load(library, "cuDeviceGet", driver.device_get) &&
         Load(library, "cuDeviceGetName", driver.device_name) &&
         Load(library, "cuDeviceGetAttribute", driver.device_attribute) &&
         Load(library, "cuDeviceTotalMem_v2", driver.device_memory) &&
         Load(library, "cuDevicePrimaryCtxRetain", driver.context_retain) &&
         Load(library, "cuDevicePrimaryCtxRelease_v2", driver.context_release) &&
         Load(library, "cuCtxPushCurrent_v2", driver.context_push) &&
         Load(library, "cuCtxPopCurrent_v2", driver.context_pop) &&
         Load(library, "cuMemGetInfo_v2", driver.memory_info);
}

// 0 where the GPU refuses a context: it has no memory for one, or belongs to another process.
std::uint64_t FreeBytes(const Driver& driver, CuDevice device) {
  CuContext context = nullptr;
  if (driver.context_retain(&context, device) != 0) return 0;
  std::size_t free = 0;
  std::size_t total = 0;
  if (driver.context_push(context) == 0) {
    if (driver.memory_info(&free, &total) != 0) free = 0;
    driver.context_pop(&context);
  }
  driver.context_release(device);
  return free;
}

// Since 7.0, but for the GTX 16 series, which is 7.5 without them.
bool HasTensorCores(const GpuHardware& gpu) {
  return gpu.major >= 7 && gpu.name.find("GTX 16") == std::string::npos;
}

bool Describe(const Driver& driver, int ordinal, GpuHardware& gpu) {
  CuDevice device = 0;
  std::array<char, 256> name = {};
  std::size_t bytes = 0;
  const bool described =
      driver.device_get(&device, ordinal) == 0 &&
      driver.device_name(name.data(), static_cast<int>(name.size()) - 1, device) == 0 &&
      driver.device_attribute(&gpu.major, kComputeCapabilityMajor, device) == 0 &&
      driver.device_attribute(&gpu.minor, kComputeCapabilityMinor, device) == 0 &&
      driver.device_attribute(&gpu.multiprocessors, kMultiprocessorCount, device) == 0 &&
      driver.device_memory(&bytes, device) == 0;
  if (!described) return false;
  gpu.name = name.data();
  gpu.memory_bytes = bytes;
  gpu.free_bytes = FreeBytes(driver, device);
  gpu.tensor_cores = HasTensorCores(gpu);
  return true;
}

}  // namespace

std::vector<GpuHardware> DescribeGpus(const char* library) {
  std::vector<GpuHardware> gpus;
  // Stays open: the driver does not survive being unloaded.
  void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  Driver driver;
  int count = 0;
  if (handle == nullptr || !LoadAll(handle, driver)) return gpus;
  if (driver.init(0) != 0 || driver.device_count(&count) != 0) return gpus;
  for (int i = 0; i < count; ++i) {
    GpuHardware gpu;
    if (Describe(driver, i, gpu)) gpus.push_back(gpu);
  }
  return gpus;
}

}  // namespace attn
