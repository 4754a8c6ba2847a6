// A CUDA driver of two GPUs, with the functions that core/gpu_hardware.cc looks for: no machine
// needs a GPU to test it. The second one gives no context away.
#include <cstddef>
#include <cstdio>

namespace {

constexpr int kSuccess = 0;
constexpr int kNoDevice = 100;
int contexts = 0;

}  // namespace

extern "C" {

int cuInit(unsigned flags) { return flags == 0 ? kSuccess : kNoDevice; }

int cuDeviceGetCount(int* count) {
  *count = 2;
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal + 40;
  return ordinal < 2 ? kSuccess : kNoDevice;
}

int cuDeviceGetName(char* name, int size, int device) {
  std::snprintf(name, static_cast<std::size_t>(size), "%s",
                device == 40 ? "NVIDIA GeForce GTX 1060" : "NVIDIA GeForce GTX 1650");
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 16:
      *value = device == 40 ? 10 : 14;
      return kSuccess;
    case 75:
      *value = device == 40 ? 6 : 7;
      return kSuccess;
    case 76:
      *value = device == 40 ? 1 : 5;
      return kSuccess;
    default:
      return kNoDevice;
  }
}

int cuDeviceTotalMem_v2(std::size_t* bytes, int) {
  *bytes = std::size_t{6} << 30;
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  if (device != 40) return kNoDevice;
  ++contexts;
  *context = &contexts;
  return kSuccess;
}

int cuDevicePrimaryCtxRelease_v2(int) {
  --contexts;
  return kSuccess;
}

int cuCtxPushCurrent_v2(void* context) { return context == &contexts ? kSuccess : kNoDevice; }

int cuCtxPopCurrent_v2(void**) { return kSuccess; }

// One that was kept would show here.
int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  *free = (std::size_t{5} << 30) / static_cast<std::size_t>(contexts);
  *total = std::size_t{6} << 30;
  return kSuccess;
}

}  // extern "C"
