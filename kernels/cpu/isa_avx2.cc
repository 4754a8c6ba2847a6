// The kernels for AVX2 with FMA and F16C.
#include <immintrin.h>

#define ATTN_ISA avx2
#define ATTN_VEC_BYTES 32
#include "kernels/cpu/isa_unit-inl.h"
