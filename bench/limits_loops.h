// Loops that do nothing but what they measure, one unit per instruction set. C headers only: the
// units are compiled with flags that the CPU at hand may not have, limits.cc asks before it calls.
#pragma once

#include <stdint.h>

namespace attn::bench {

// Independent multiply-adds, operands and accumulators in registers.
struct ArithmeticLoop {
  const char* name;
  double flops_per_step;
  // Returns what depends on every accumulator.
  float (*run)(int64_t steps);
};

// Reads `bytes` bytes from a 64-byte aligned address: `streams` of them side by side, `stride`
// bytes apart, block after block. `bytes` is a multiple of streams * stride, that one of 64.
struct ReadLoop {
  const char* name;
  int streams;
  uint64_t (*run)(const char* data, int64_t bytes, int64_t stride);
};

constexpr int kReadVariants = 8;

namespace scalar {
extern const ArithmeticLoop kFloat32Loop;
extern const ReadLoop kReadLoops[kReadVariants];
}  // namespace scalar
namespace avx2 {
extern const ArithmeticLoop kFloat32Loop;
extern const ReadLoop kReadLoops[kReadVariants];
}  // namespace avx2
namespace avx512 {
extern const ArithmeticLoop kFloat32Loop;
extern const ReadLoop kReadLoops[kReadVariants];
}  // namespace avx512
namespace avx512_bf16 {
extern const ArithmeticLoop kBFloat16Loop;
}  // namespace avx512_bf16

}  // namespace attn::bench
