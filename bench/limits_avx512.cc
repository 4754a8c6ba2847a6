// The limits' loops for AVX-512. Accumulators are named: compilers keep arrays in memory.
#include <immintrin.h>

#include "bench/limits_loops.h"

namespace attn::bench::avx512 {
namespace {

typedef uint64_t VecRead __attribute__((vector_size(64), may_alias));
#include "bench/read_loops-inl.h"

float MultiplyAdd(int64_t steps) {
  const __m512 factor = _mm512_set1_ps(0.999f);
  const __m512 term = _mm512_set1_ps(0.001f);
  __m512 a0 = _mm512_set1_ps(0.0f);
  __m512 a1 = _mm512_set1_ps(1.0f);
  __m512 a2 = _mm512_set1_ps(2.0f);
  __m512 a3 = _mm512_set1_ps(3.0f);
  __m512 a4 = _mm512_set1_ps(4.0f);
  __m512 a5 = _mm512_set1_ps(5.0f);
  __m512 a6 = _mm512_set1_ps(6.0f);
  __m512 a7 = _mm512_set1_ps(7.0f);
  __m512 a8 = _mm512_set1_ps(8.0f);
  __m512 a9 = _mm512_set1_ps(9.0f);
  __m512 a10 = _mm512_set1_ps(10.0f);
  __m512 a11 = _mm512_set1_ps(11.0f);
  __m512 a12 = _mm512_set1_ps(12.0f);
  __m512 a13 = _mm512_set1_ps(13.0f);
  __m512 a14 = _mm512_set1_ps(14.0f);
  __m512 a15 = _mm512_set1_ps(15.0f);
  for (int64_t step = 0; step < steps; ++step) {
    a0 = _mm512_fmadd_ps(a0, factor, term);
    a1 = _mm512_fmadd_ps(a1, factor, term);
    a2 = _mm512_fmadd_ps(a2, factor, term);
    a3 = _mm512_fmadd_ps(a3, factor, term);
    a4 = _mm512_fmadd_ps(a4, factor, term);
    a5 = _mm512_fmadd_ps(a5, factor, term);
    a6 = _mm512_fmadd_ps(a6, factor, term);
    a7 = _mm512_fmadd_ps(a7, factor, term);
    a8 = _mm512_fmadd_ps(a8, factor, term);
    a9 = _mm512_fmadd_ps(a9, factor, term);
    a10 = _mm512_fmadd_ps(a10, factor, term);
    a11 = _mm512_fmadd_ps(a11, factor, term);
    a12 = _mm512_fmadd_ps(a12, factor, term);
    a13 = _mm512_fmadd_ps(a13, factor, term);
    a14 = _mm512_fmadd_ps(a14, factor, term);
    a15 = _mm512_fmadd_ps(a15, factor, term);
  }
  a0 = _mm512_add_ps(a0, a1);
  a0 = _mm512_add_ps(a0, a2);
  a0 = _mm512_add_ps(a0, a3);
  a0 = _mm512_add_ps(a0, a4);
  a0 = _mm512_add_ps(a0, a5);
  a0 = _mm512_add_ps(a0, a6);
  a0 = _mm512_add_ps(a0, a7);
  a0 = _mm512_add_ps(a0, a8);
  a0 = _mm512_add_ps(a0, a9);
  a0 = _mm512_add_ps(a0, a10);
  a0 = _mm512_add_ps(a0, a11);
  a0 = _mm512_add_ps(a0, a12);
  a0 = _mm512_add_ps(a0, a13);
  a0 = _mm512_add_ps(a0, a14);
  a0 = _mm512_add_ps(a0, a15);
  return _mm512_cvtss_f32(a0);
}

}  // namespace

extern const ArithmeticLoop kFloat32Loop = {"avx512 fma", 16 * 16 * 2, &MultiplyAdd};
extern const ReadLoop kReadLoops[kReadVariants] = ATTN_READ_TABLE;

}  // namespace attn::bench::avx512
