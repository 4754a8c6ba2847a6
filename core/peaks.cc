#include "core/peaks.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/cpu/isa.h"

namespace attn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kSteps = std::int64_t{1} << 18;     // about a millisecond
constexpr std::size_t kReadBytes = std::size_t{64} << 20;  // more than most last-level caches
constexpr std::size_t kChunkBytes = std::size_t{1} << 20;
constexpr int kRepeats = 3;

// Independent multiply-adds in registers, vectors of `bytes`: a function for each instruction set
// by its target attribute, which leaves nothing of it outside of that function.
#define ATTN_MULTIPLY_ADD_LOOP(name, bytes, target)                     \
  target float name(std::int64_t steps) {                               \
    typedef float Vec __attribute__((vector_size(bytes)));              \
    const Vec factor = Vec{} + 0.999f;                                  \
    const Vec term = Vec{} + 0.001f;                                    \
    Vec a0 = Vec{}, a1 = a0 + 1.0f, a2 = a0 + 2.0f, a3 = a0 + 3.0f;     \
    Vec a4 = a0 + 4.0f, a5 = a0 + 5.0f, a6 = a0 + 6.0f, a7 = a0 + 7.0f; \
    Vec a8 = a0 + 8.0f, a9 = a0 + 9.0f;                                 \
    for (std::int64_t step = 0; step < steps; ++step) {                 \
      a0 = a0 * factor + term, a1 = a1 * factor + term;                 \
      a2 = a2 * factor + term, a3 = a3 * factor + term;                 \
      a4 = a4 * factor + term, a5 = a5 * factor + term;                 \
      a6 = a6 * factor + term, a7 = a7 * factor + term;                 \
      a8 = a8 * factor + term, a9 = a9 * factor + term;                 \
    }                                                                   \
    const Vec sum = a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9;    \
    return sum[0] + sum[1] + sum[2] + sum[3];                           \
  }

struct ArithmeticLoop {
  const char* isa;
  float (*run)(std::int64_t steps);
  int lanes;
};

ATTN_MULTIPLY_ADD_LOOP(MultiplyAdd16, 16, )
#if defined(__x86_64__)
ATTN_MULTIPLY_ADD_LOOP(MultiplyAdd32, 32, __attribute__((target("avx2,fma"))))
ATTN_MULTIPLY_ADD_LOOP(MultiplyAdd64, 64,
                       __attribute__((target("avx512f,prefer-vector-width=512"))))
constexpr ArithmeticLoop kLoops[] = {{"avx512_bf16", &MultiplyAdd64, 16},
                                     {"avx512", &MultiplyAdd64, 16},
                                     {"avx2", &MultiplyAdd32, 8},
                                     {"scalar", &MultiplyAdd16, 4}};
#else
constexpr ArithmeticLoop kLoops[] = {{"scalar", &MultiplyAdd16, 4}};
#endif
constexpr int kAccumulators = 10;

#undef ATTN_MULTIPLY_ADD_LOOP

const ArithmeticLoop& LoopOfThisCpu() {
  for (const ArithmeticLoop& loop : kLoops) {
    if (std::strcmp(loop.isa, kernels::cpu::ActiveIsa().name) == 0) return loop;
  }
  return kLoops[std::size(kLoops) - 1];
}

// Sanitizers would check every load.
__attribute__((no_sanitize("thread", "address"))) std::uint64_t ReadChunk(const char* data) {
  typedef std::uint64_t Vec __attribute__((vector_size(16), may_alias));
  const Vec* const vectors = reinterpret_cast<const Vec*>(data);
  Vec a = {}, b = {}, c = {}, d = {};
  for (std::size_t i = 0; i < kChunkBytes / sizeof(Vec); i += 4) {
    a ^= vectors[i];
    b ^= vectors[i + 1];
    c ^= vectors[i + 2];
    d ^= vectors[i + 3];
  }
  const Vec all = a ^ b ^ c ^ d;
  return all[0] ^ all[1];
}

// The best of a few: what disturbs makes slower.
template <typename Body>
double BestSeconds(Body body) {
  double best = 1e9;
  for (int i = 0; i < kRepeats; ++i) {
    const auto begin = Clock::now();
    body();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return std::max(best, 1e-9);
}

// Keeps a loop's result from being dropped.
void Use(std::uint64_t value) { asm volatile("" : : "r"(value) : "memory"); }

}  // namespace

Peaks MeasurePeaks(Device& device) {
  Peaks peaks;
  const absl::StatusOr<Buffer> memory = device.Allocate(kReadBytes);
  if (!memory.ok()) return peaks;
  char* const data = static_cast<char*>(memory->data.get());
  const ArithmeticLoop& loop = LoopOfThisCpu();
  Executor& executor = device.executor();
  const int threads = executor.threads();
  constexpr auto kChunks = static_cast<std::int64_t>(kReadBytes / kChunkBytes);
  executor.ParallelFor(kChunks, [&](std::int64_t i, int) {
    std::memset(data + static_cast<std::size_t>(i) * kChunkBytes, 1, kChunkBytes);
  });
  const double arithmetic = BestSeconds([&] {
    executor.ParallelFor(threads, [&](std::int64_t, int) {
      const float sum = loop.run(kSteps);
      std::uint32_t bits = 0;
      std::memcpy(&bits, &sum, sizeof(bits));
      Use(bits);
    });
  });
  const double reads = BestSeconds([&] {
    executor.ParallelFor(kChunks, [&](std::int64_t i, int) {
      Use(ReadChunk(data + static_cast<std::size_t>(i) * kChunkBytes));
    });
  });
  const double operations =
      2.0 * kAccumulators * static_cast<double>(loop.lanes) * static_cast<double>(kSteps) * threads;
  peaks.operations_per_second = operations / arithmetic;
  peaks.bytes_per_second = static_cast<double>(kReadBytes) / reads;
  return peaks;
}

}  // namespace attn
