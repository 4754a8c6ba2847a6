// kernels/cpu/isa_avx512_bf16.cc over emulated instructions.
#include "tests/kernels/simde/intrinsics.h"

#define ATTN_ISA simde_avx512_bf16
#define ATTN_VEC_BYTES 64
#define ATTN_NATIVE_BF16
#include "kernels/cpu/isa_unit-inl.h"
