// The limit's loop for AVX-512's dot product of bfloat16 pairs (vdpbf16ps).
#include <immintrin.h>

#include "bench/limits_loops.h"

namespace attn::bench::avx512_bf16 {
namespace {

float MultiplyAdd(int64_t steps) {
  // Pairs (1, 1) and (1, -1): the accumulators stay what they are.
  const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  const __m512bh right =
      reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(0xbf803f80)));
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
  __m512 a16 = _mm512_set1_ps(16.0f);
  __m512 a17 = _mm512_set1_ps(17.0f);
  __m512 a18 = _mm512_set1_ps(18.0f);
  __m512 a19 = _mm512_set1_ps(19.0f);
  for (int64_t step = 0; step < steps; ++step) {
    a0 = _mm512_dpbf16_ps(a0, left, right);
    a1 = _mm512_dpbf16_ps(a1, left, right);
    a2 = _mm512_dpbf16_ps(a2, left, right);
    a3 = _mm512_dpbf16_ps(a3, left, right);
    a4 = _mm512_dpbf16_ps(a4, left, right);
    a5 = _mm512_dpbf16_ps(a5, left, right);
    a6 = _mm512_dpbf16_ps(a6, left, right);
    a7 = _mm512_dpbf16_ps(a7, left, right);
    a8 = _mm512_dpbf16_ps(a8, left, right);
    a9 = _mm512_dpbf16_ps(a9, left, right);
    a10 = _mm512_dpbf16_ps(a10, left, right);
    a11 = _mm512_dpbf16_ps(a11, left, right);
    a12 = _mm512_dpbf16_ps(a12, left, right);
    a13 = _mm512_dpbf16_ps(a13, left, right);
    a14 = _mm512_dpbf16_ps(a14, left, right);
    a15 = _mm512_dpbf16_ps(a15, left, right);
    a16 = _mm512_dpbf16_ps(a16, left, right);
    a17 = _mm512_dpbf16_ps(a17, left, right);
    a18 = _mm512_dpbf16_ps(a18, left, right);
    a19 = _mm512_dpbf16_ps(a19, left, right);
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
  a0 = _mm512_add_ps(a0, a16);
  a0 = _mm512_add_ps(a0, a17);
  a0 = _mm512_add_ps(a0, a18);
  a0 = _mm512_add_ps(a0, a19);
  return _mm512_cvtss_f32(a0);
}

}  // namespace

extern const ArithmeticLoop kBFloat16Loop = {"avx512_bf16 vdpbf16ps", 20 * 32 * 2, &MultiplyAdd};

}  // namespace attn::bench::avx512_bf16
