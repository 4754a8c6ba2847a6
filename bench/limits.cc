#include "bench/limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"

namespace attn::bench {
namespace {

// Eight times the largest last-level cache of the machines at hand.
constexpr std::int64_t kReadBytes = std::int64_t{256} << 20;
// What one task reads: long enough for prefetchers and translations, short enough that threads end
// together.
constexpr std::int64_t kTaskBytes = std::int64_t{4} << 20;
constexpr std::int64_t kNearStride = 4096;
constexpr int kChoiceRounds = 3;

// Tasks per thread of an arithmetic measurement: a thread that is held up leaves its share to the
// others, as kernels do.
constexpr int kTasksPerThread = 16;
constexpr std::int64_t kCalibrationSteps = 200'000;

// Keeps results from being optimised away.
std::atomic<std::uint64_t> result_sink{0};

void Sink(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  result_sink.fetch_xor(bits, std::memory_order_relaxed);
}

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool HasAvx512() { return __builtin_cpu_supports("avx512f"); }
bool HasBFloat16() { return HasAvx512() && __builtin_cpu_supports("avx512bf16"); }

const ArithmeticLoop& ChooseLoop(const std::string& dtype) {
  __builtin_cpu_init();
  if (dtype == "bfloat16" && HasBFloat16()) return avx512_bf16::kBFloat16Loop;
  if (HasAvx512()) return avx512::kFloat32Loop;
  return HasAvx2() ? avx2::kFloat32Loop : scalar::kFloat32Loop;
}

const ReadLoop* ReadLoops() {
  __builtin_cpu_init();
  if (HasAvx512()) return avx512::kReadLoops;
  return HasAvx2() ? avx2::kReadLoops : scalar::kReadLoops;
}

double TimeSteps(Device& device, const ArithmeticLoop& loop, std::int64_t steps_per_task) {
  double seconds = 0;
  device.executor().Run([&] {
    const double begin = Seconds();
    device.executor().ParallelFor(kTasksPerThread * device.executor().threads(),
                                  [&](std::int64_t, int) { Sink(loop.run(steps_per_task)); });
    seconds = Seconds() - begin;
  });
  return seconds;
}

}  // namespace

const char* MachineLimits::FlopsLoop(const std::string& dtype) { return ChooseLoop(dtype).name; }

double MachineLimits::FlopsPerSecond(const std::string& dtype, double seconds) {
  const ArithmeticLoop& loop = ChooseLoop(dtype);
  const double begin = Seconds();
  Sink(loop.run(kCalibrationSteps));
  const double per_step = (Seconds() - begin) / static_cast<double>(kCalibrationSteps);
  const auto steps =
      std::max<std::int64_t>(1, static_cast<std::int64_t>(seconds / per_step / kTasksPerThread));
  const double took = TimeSteps(device_, loop, steps);
  return loop.flops_per_step * static_cast<double>(steps) * kTasksPerThread *
         device_.executor().threads() / took;
}

bool MachineLimits::PrepareReads() {
  absl::StatusOr<Buffer> memory = device_.Allocate(static_cast<std::size_t>(kReadBytes));
  if (!memory.ok()) return false;
  memory_ = *std::move(memory);
  device_.Fill(memory_.data.get(), 1, memory_.bytes);
  double best = 0;
  const ReadLoop* const loops = ReadLoops();
  for (int i = 0; i < kReadVariants; ++i) {
    for (const std::int64_t stride : {kNearStride, kTaskBytes / loops[i].streams}) {
      std::vector<double> rates;
      for (int round = 0; round < kChoiceRounds; ++round) {
        rates.push_back(TimeReads(loops[i], stride));
      }
      std::sort(rates.begin(), rates.end());
      if (rates[kChoiceRounds / 2] <= best) continue;
      best = rates[kChoiceRounds / 2];
      best_ = &loops[i];
      best_stride_ = stride;
      read_loop_ = absl::StrCat(loops[i].name, ", ", stride / 1024, " KiB apart");
    }
  }
  return true;
}

double MachineLimits::TimeReads(const ReadLoop& loop, std::int64_t stride) {
  const char* const data = static_cast<const char*>(memory_.data.get());
  double seconds = 0;
  device_.executor().Run([&] {
    const double begin = Seconds();
    device_.executor().ParallelFor(kReadBytes / kTaskBytes, [&](std::int64_t task, int) {
      result_sink.fetch_xor(loop.run(data + task * kTaskBytes, kTaskBytes, stride),
                            std::memory_order_relaxed);
    });
    seconds = Seconds() - begin;
  });
  return static_cast<double>(kReadBytes) / seconds;
}

double MachineLimits::ReadBytesPerSecond() {
  if (best_ == nullptr && !PrepareReads()) return 0;
  return TimeReads(*best_, best_stride_);
}

}  // namespace attn::bench
