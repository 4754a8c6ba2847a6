#include "core/hardware_profiles.h"

#include <array>
#include <cstddef>

namespace attn {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

// Least squares over interleaved medians of 39 points of `scripts/bench selector` on a Zen 3 with
// AVX2, rounded, with the passes of standard raised by hand where it looked too cheap; other
// instruction sets are taken to use their peaks alike.
constexpr ImplementationCosts kAvx2Costs[] = {
    {"flash", 4e-6, 2.3e-7, {0.88, 0.76, 0.59, 0.87}, 1.9, 0.4, 3.3, 0.6, 0.0, true},
    {"torch_sdpa", 4.3e-5, 0.0, {0.82, 0.33, 0.59, 0.45}, 3.1, 9.4, 6.9, 4.4, 300.0, true},
    {"standard", 3.3e-6, 1e-8, {0.60, 0.55, 0.47, 0.55}, 4.0, 8.0, 4.2, 0.0, 60.0, false},
    {"memory_efficient", 6e-6, 2.3e-7, {0.85, 0.73, 0.57, 0.84}, 1.9, 0.4, 3.5, 0.6, 0.0, true},
    {"sparse", 1e-5, 4e-7, {0.88, 0.76, 0.59, 0.87}, 1.9, 0.4, 3.3, 0.6, 0.0, true},
    {"", 2e-5, 2e-7, {0.60, 0.33, 0.47, 0.45}, 4.0, 9.4, 6.9, 4.4, 60.0, true},
};
constexpr absl::Span<const ImplementationCosts> kCpuCosts = kAvx2Costs;

// Tensor cores multiply float16 and bfloat16 alone, bfloat16 since 8.0; without them float16 is
// stored, and computed with as float32.
constexpr ImplementationCosts kSm60Costs[] = {
    {"flash", 1e-5, 0.0, {0.45, 0.45, 0.40, 0.40}, 1.0, 1.0, 1.0, 0.0, 0.0, true},
    {"memory_efficient", 1e-5, 0.0, {0.60, 0.60, 0.50, 0.50}, 1.0, 1.0, 1.0, 0.0, 0.0, true},
    {"standard", 3e-5, 0.0, {0.70, 0.70, 0.60, 0.60}, 1.0, 3.0, 1.0, 4.0, 1.0, true},
    {"", 3e-5, 0.0, {0.40, 0.40, 0.40, 0.40}, 1.0, 3.0, 1.0, 2.0, 1.0, true},
};
constexpr ImplementationCosts kSm70Costs[] = {
    {"flash", 1e-5, 0.0, {0.50, 0.40, 0.40, 0.40}, 1.0, 1.0, 1.0, 0.0, 0.0, true},
    {"memory_efficient", 1e-5, 0.0, {0.55, 0.35, 0.50, 0.40}, 1.0, 1.0, 1.0, 0.0, 0.0, true},
    {"standard", 3e-5, 0.0, {0.70, 0.60, 0.60, 0.60}, 1.0, 3.0, 1.0, 4.0, 1.0, true},
    {"", 3e-5, 0.0, {0.40, 0.30, 0.30, 0.30}, 1.0, 3.0, 1.0, 2.0, 1.0, true},
};
constexpr ImplementationCosts kSm80Costs[] = {
    {"flash", 1e-5, 0.0, {0.55, 0.65, 0.65, 0.50}, 1.0, 1.0, 1.0, 0.0, 0.0, true},
    {"memory_efficient", 1e-5, 0.0, {0.55, 0.45, 0.45, 0.40}, 1.0, 1.0, 1.0, 0.0, 0.0, true},
    {"standard", 3e-5, 0.0, {0.75, 0.70, 0.70, 0.60}, 1.0, 3.0, 1.0, 4.0, 1.0, true},
    {"", 3e-5, 0.0, {0.45, 0.40, 0.40, 0.40}, 1.0, 3.0, 1.0, 2.0, 1.0, true},
};

// Without fused multiply-adds, "scalar" reaches what compilers make of SSE2.
constexpr HardwareProfile kProfiles[] = {
    {"cpu/avx512_bf16", "cpu", {64, 64, 128, 64}, 2.5e9, 3e10, 1.08, 16 * kMiB, kCpuCosts},
    {"cpu/avx512", "cpu", {64, 64, 64, 64}, 2.5e9, 3e10, 1.08, 16 * kMiB, kCpuCosts},
    {"cpu/avx2", "cpu", {32, 32, 32, 32}, 3.0e9, 2.5e10, 1.08, 16 * kMiB, kCpuCosts},
    {"cpu/scalar", "cpu", {8, 8, 8, 8}, 3.0e9, 2e10, 1.08, 16 * kMiB, kCpuCosts},
    // H100: 132 multiprocessors, 67 TFLOP/s, 989 with tensor cores, 3.3 TB/s.
    {"cuda/sm90", "cuda", {256, 4096, 4096, 8192}, 1.8e9, 3.3e12, 1.05, 64 * kMiB, kSm80Costs},
    // A100: 108 multiprocessors, 19.5 TFLOP/s, 312 with tensor cores, 1.6 TB/s.
    {"cuda/sm80", "cuda", {128, 2048, 2048, 4096}, 1.4e9, 1.6e12, 1.05, 64 * kMiB, kSm80Costs},
    // V100: 80 multiprocessors, 15.7 TFLOP/s, 125 with tensor cores, 0.9 TB/s.
    {"cuda/sm70", "cuda", {128, 1024, 128, 128}, 1.5e9, 9e11, 1.05, 64 * kMiB, kSm70Costs},
    // GTX 1060: 10 multiprocessors, 4.4 TFLOP/s, 0.19 TB/s.
    {"cuda/sm61", "cuda", {256, 256, 256, 256}, 1.7e9, 1.9e11, 1.05, 32 * kMiB, kSm60Costs},
};

const HardwareProfile& Named(const std::string& name, const char* backend) {
  const HardwareProfile* last = nullptr;
  for (const HardwareProfile& profile : kProfiles) {
    if (profile.name == name) return profile;
    if (std::string(profile.backend) == backend) last = &profile;
  }
  return *last;
}

// From which capability on a profile holds; the first that does.
struct CapabilityRow {
  int major;
  bool tensor_cores;
  const char* profile;
};
constexpr CapabilityRow kCapabilities[] = {
    {9, true, "cuda/sm90"}, {8, true, "cuda/sm80"}, {7, true, "cuda/sm70"}};

}  // namespace

double PerDType::Of(DType dtype) const {
  switch (dtype) {
    case DType::kFloat16:
      return float16;
    case DType::kBFloat16:
      return bfloat16;
    case DType::kInt8:
      return int8;
    default:
      return float32;
  }
}

const ImplementationCosts& HardwareProfile::CostsOf(const std::string& implementation) const {
  for (const ImplementationCosts& row : costs) {
    if (row.name == implementation) return row;
  }
  return costs.back();
}

absl::Span<const HardwareProfile> HardwareProfiles() { return kProfiles; }

const HardwareProfile& ProfileOfCpu(const std::string& isa) { return Named("cpu/" + isa, "cpu"); }

const HardwareProfile& ProfileOfGpu(const GpuHardware& gpu) {
  for (const CapabilityRow& row : kCapabilities) {
    if (gpu.major >= row.major && gpu.tensor_cores >= row.tensor_cores) {
      return Named(row.profile, "cuda");
    }
  }
  return Named("cuda/sm61", "cuda");
}

}  // namespace attn
