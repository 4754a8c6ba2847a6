// AVX-512's intrinsics on a CPU that has AVX2, F16C and FMA: SIMDe's, and behind them those of the
// kernels that SIMDe lacks or leaves vague, each with what the instruction does, bit by bit. What
// the kernels use and neither has does not compile: it would need the instruction.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <string.h>

#ifdef __AVX512F__
#error "compile without AVX-512: nothing would be emulated"
#endif

namespace simde_shim {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <typename To, typename From>
inline To As(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Subnormal numbers become zeros of their sign.
inline Bits Flush(Bits bits) { return (bits & 0x7f800000u) == 0u ? bits & 0x80000000u : bits; }

// One half of vdpbf16ps: a fused multiply-add that reads and writes no subnormal numbers. `a` and
// `b` are bfloat16 in the lanes' upper halves.
inline Bits MultiplyAdd(Bits sum, Bits a, Bits b) {
  const Floats result = As<Floats>(Flush(a)) * As<Floats>(Flush(b)) + As<Floats>(Flush(sum));
  return Flush(As<Bits>(result));
}

// Odd elements first, as the instruction's definition has it.
inline __m512 Dpbf16(__m512 sum, __m512bh a, __m512bh b) {
  const Bits x = As<Bits>(a);
  const Bits y = As<Bits>(b);
  const Bits odd = MultiplyAdd(As<Bits>(sum), x & 0xffff0000u, y & 0xffff0000u);
  return As<__m512>(MultiplyAdd(odd, x << 16, y << 16));
}

// vcvtneps2bf16: to nearest even; NaNs turn quiet.
inline __m256bh CvtnepsPbh(__m512 v) {
  const Bits bits = Flush(As<Bits>(v));
  const Bits rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const Bits is_nan = As<Bits>((bits & 0x7fffffffu) > 0x7f800000u);
  const Bits upper = ((is_nan & (bits | 0x400000u)) | (~is_nan & rounded)) >> 16;
  return As<__m256bh>(__builtin_convertvector(upper, Halves));
}

template <int kMask>
inline __m512 MaskzCvtphPs(__m256i v) {
  static_assert(kMask == 0xffff);
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
  return As<__m512>(halves);
}

template <int kMask, int kRounding>
inline __m256i MaskzCvtpsPh(__m512 v) {
  static_assert(kMask == 0xffff);
  __m256 halves[2];
  memcpy(halves, &v, sizeof(halves));
  return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], kRounding),
                          _mm256_cvtps_ph(halves[0], kRounding));
}

// vpmaddwd: neighbours of int16 multiplied, and each two products added.
inline __m512i MaddEpi16(__m512i a, __m512i b) {
  __m256i x[2];
  __m256i y[2];
  memcpy(x, &a, sizeof(x));
  memcpy(y, &b, sizeof(y));
  const __m256i sums[2] = {_mm256_madd_epi16(x[0], y[0]), _mm256_madd_epi16(x[1], y[1])};
  return As<__m512i>(sums);
}

}  // namespace simde_shim

#undef _mm512_dpbf16_ps
#undef _mm512_madd_epi16
#define _mm512_dpbf16_ps(sum, a, b) ::simde_shim::Dpbf16(sum, a, b)
#define _mm512_cvtneps_pbh(v) ::simde_shim::CvtnepsPbh(v)
#define _mm512_maskz_cvtph_ps(mask, v) ::simde_shim::MaskzCvtphPs<mask>(v)
#define _mm512_maskz_cvtps_ph(mask, v, rounding) ::simde_shim::MaskzCvtpsPh<mask, rounding>(v)
#define _mm512_madd_epi16(a, b) ::simde_shim::MaddEpi16(a, b)
