// The kernels for AVX-512 (F, BW, DQ, VL).
#include <immintrin.h>

#define ATTN_ISA avx512
#define ATTN_VEC_BYTES 64
#include "kernels/cpu/isa_unit-inl.h"
