// Stands in for kernels/cpu/isa_table.cc in simde_test, so that every test that walks over the
// instruction sets, and core, meet the emulated units and nothing else.
#include "kernels/cpu/isa.h"

namespace attn::kernels {

namespace simde_avx512 {
extern const cpu::UnitKernels kUnit;
}
namespace simde_avx512_bf16 {
extern const cpu::UnitKernels kUnit;
}

namespace cpu {
namespace {

// What the emulated units are compiled for, compiled without it.
bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

IsaTable CompiledIsas() noexcept {
  static const IsaKernels rows[] = {
      {simde_avx512_bf16::kUnit, "avx512_bf16", &HasAvx2},
      {simde_avx512::kUnit, "avx512", &HasAvx2},
  };
  return {rows, sizeof(rows) / sizeof(rows[0])};
}

}  // namespace cpu
}  // namespace attn::kernels
