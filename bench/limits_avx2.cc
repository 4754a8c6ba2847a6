// The limits' loops for AVX2 with FMA. Accumulators are named: compilers keep arrays in memory.
#include <immintrin.h>

#include "bench/limits_loops.h"

namespace attn::bench::avx2 {
namespace {

typedef uint64_t VecRead __attribute__((vector_size(32), may_alias));
#include "bench/read_loops-inl.h"

float MultiplyAdd(int64_t steps) {
  const __m256 factor = _mm256_set1_ps(0.999f);
  const __m256 term = _mm256_set1_ps(0.001f);
  __m256 a0 = _mm256_set1_ps(0.0f);
  __m256 a1 = _mm256_set1_ps(1.0f);
  __m256 a2 = _mm256_set1_ps(2.0f);
  __m256 a3 = _mm256_set1_ps(3.0f);
  __m256 a4 = _mm256_set1_ps(4.0f);
  __m256 a5 = _mm256_set1_ps(5.0f);
  __m256 a6 = _mm256_set1_ps(6.0f);
  __m256 a7 = _mm256_set1_ps(7.0f);
  __m256 a8 = _mm256_set1_ps(8.0f);
  __m256 a9 = _mm256_set1_ps(9.0f);
  __m256 a10 = _mm256_set1_ps(10.0f);
  __m256 a11 = _mm256_set1_ps(11.0f);
  for (int64_t step = 0; step < steps; ++step) {
    a0 = _mm256_fmadd_ps(a0, factor, term);
    a1 = _mm256_fmadd_ps(a1, factor, term);
    a2 = _mm256_fmadd_ps(a2, factor, term);
    a3 = _mm256_fmadd_ps(a3, factor, term);
    a4 = _mm256_fmadd_ps(a4, factor, term);
    a5 = _mm256_fmadd_ps(a5, factor, term);
    a6 = _mm256_fmadd_ps(a6, factor, term);
    a7 = _mm256_fmadd_ps(a7, factor, term);
    a8 = _mm256_fmadd_ps(a8, factor, term);
    a9 = _mm256_fmadd_ps(a9, factor, term);
    a10 = _mm256_fmadd_ps(a10, factor, term);
    a11 = _mm256_fmadd_ps(a11, factor, term);
  }
  a0 = _mm256_add_ps(a0, a1);
  a0 = _mm256_add_ps(a0, a2);
  a0 = _mm256_add_ps(a0, a3);
  a0 = _mm256_add_ps(a0, a4);
  a0 = _mm256_add_ps(a0, a5);
  a0 = _mm256_add_ps(a0, a6);
  a0 = _mm256_add_ps(a0, a7);
  a0 = _mm256_add_ps(a0, a8);
  a0 = _mm256_add_ps(a0, a9);
  a0 = _mm256_add_ps(a0, a10);
  a0 = _mm256_add_ps(a0, a11);
  return _mm256_cvtss_f32(a0);
}

}  // namespace

extern const ArithmeticLoop kFloat32Loop = {"avx2 fma", 12 * 8 * 2, &MultiplyAdd};
extern const ReadLoop kReadLoops[kReadVariants] = ATTN_READ_TABLE;

}  // namespace attn::bench::avx2
