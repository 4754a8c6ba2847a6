// kernels/cpu/isa_avx512.cc over emulated instructions.
#include "tests/kernels/simde/intrinsics.h"

#define ATTN_ISA simde_avx512
#define ATTN_VEC_BYTES 64
#include "kernels/cpu/isa_unit-inl.h"
