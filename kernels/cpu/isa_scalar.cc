// The kernels for any x86-64 CPU (four lanes of SSE2).
#define ATTN_ISA scalar
#define ATTN_VEC_BYTES 16
#include "kernels/cpu/isa_unit-inl.h"
