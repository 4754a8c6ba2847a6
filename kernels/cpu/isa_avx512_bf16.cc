// The kernels for AVX-512 with dot products of bfloat16.
#include <immintrin.h>

#define ATTN_ISA avx512_bf16
#define ATTN_VEC_BYTES 64
#define ATTN_NATIVE_BF16
#include "kernels/cpu/isa_unit-inl.h"
