// The limits' loops for what every CPU of the platform has: four lanes, multiplication, then
// addition.
#include "bench/limits_loops.h"

namespace attn::bench::scalar {
namespace {

typedef float VecF __attribute__((vector_size(16)));
typedef uint64_t VecRead __attribute__((vector_size(16), may_alias));
#include "bench/read_loops-inl.h"

float MultiplyAdd(int64_t steps) {
  const VecF factor = {0.999f, 0.999f, 0.999f, 0.999f};
  const VecF term = {0.001f, 0.001f, 0.001f, 0.001f};
  VecF a0 = {0.0f, 1.0f, 2.0f, 3.0f};
  VecF a1 = {1.0f, 1.0f, 2.0f, 3.0f};
  VecF a2 = {2.0f, 1.0f, 2.0f, 3.0f};
  VecF a3 = {3.0f, 1.0f, 2.0f, 3.0f};
  VecF a4 = {4.0f, 1.0f, 2.0f, 3.0f};
  VecF a5 = {5.0f, 1.0f, 2.0f, 3.0f};
  VecF a6 = {6.0f, 1.0f, 2.0f, 3.0f};
  VecF a7 = {7.0f, 1.0f, 2.0f, 3.0f};
  for (int64_t step = 0; step < steps; ++step) {
    a0 = a0 * factor + term;
    a1 = a1 * factor + term;
    a2 = a2 * factor + term;
    a3 = a3 * factor + term;
    a4 = a4 * factor + term;
    a5 = a5 * factor + term;
    a6 = a6 * factor + term;
    a7 = a7 * factor + term;
  }
  a0 = a0 + a1;
  a0 = a0 + a2;
  a0 = a0 + a3;
  a0 = a0 + a4;
  a0 = a0 + a5;
  a0 = a0 + a6;
  a0 = a0 + a7;
  return a0[0] + a0[1] + a0[2] + a0[3];
}

}  // namespace

extern const ArithmeticLoop kFloat32Loop = {"scalar", 8 * 4 * 2, &MultiplyAdd};
extern const ReadLoop kReadLoops[kReadVariants] = ATTN_READ_TABLE;

}  // namespace attn::bench::scalar
