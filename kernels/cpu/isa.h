// Which instruction set the CPU kernels use: detected once, best first. The environment variable
// ATTN_FORCE_ISA (scalar, avx2, avx512, avx512_bf16) overrides the choice.
#pragma once

#include "kernels/attention_args.h"
#include "kernels/cpu/isa_units.h"

namespace attn::kernels::cpu {

// One row per compiled instruction set: its kernels and its name.
struct IsaKernels : UnitKernels {
  const char* name;
  bool (*supported)();  // by this CPU and operating system
};

// What its flash kernel rounds weights to before values are multiplied with them. kInt8: what lies
// beside elements of int8, weights and queries alike, is rounded to int16.
inline ElementType FlashWeightType(const IsaKernels& isa, const AttentionArgs& args) {
  if (isa.integer_products && args.paged && args.kv_dtype == ElementType::kInt8) {
    return ElementType::kInt8;
  }
  const bool native = isa.native_bfloat16 && args.dtype == ElementType::kBFloat16 &&
                      args.kv_dtype == ElementType::kBFloat16;
  return native ? ElementType::kBFloat16 : ElementType::kFloat32;
}

struct IsaTable {
  const IsaKernels* rows;
  int64_t size;
};

// All compiled instruction sets, best first; the last one runs everywhere.
IsaTable CompiledIsas() noexcept;

// The best supported row, or the one named `forced` (null or empty: none is). A name that is
// unknown, or that this CPU can't run, gives the last row and an error.
struct IsaChoice {
  const IsaKernels* row;
  const char* error;  // null: none
};
IsaChoice ChooseIsa(const char* forced) noexcept;

// The row in use. An ATTN_FORCE_ISA that is unknown, or that this CPU can't run, is refused:
// ForcedIsaError() says so, and the server does not start.
const IsaKernels& ActiveIsa() noexcept;
const char* ForcedIsaError() noexcept;  // null: no error

}  // namespace attn::kernels::cpu
