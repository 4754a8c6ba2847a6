// The table of compiled instruction sets, and whether this machine has them; compiled without the
// flags of any.
#include <cpuid.h>

#include "kernels/cpu/isa.h"

namespace attn::kernels::cpu {
namespace {

// Clang 14's builtin does not know this one; that registers are saved is asked with the others.
bool HasF16c() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// What the unit's flags let the compiler use; asks the operating system too whether it saves the
// registers.
bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c();
}
bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool HasAvx512Bf16() { return HasAvx512() && __builtin_cpu_supports("avx512bf16"); }
bool HasAnything() { return true; }

}  // namespace

IsaTable CompiledIsas() noexcept {
  __builtin_cpu_init();
  static const IsaKernels rows[] = {
      {avx512_bf16::kUnit, "avx512_bf16", &HasAvx512Bf16},
      {avx512::kUnit, "avx512", &HasAvx512},
      {avx2::kUnit, "avx2", &HasAvx2},
      {scalar::kUnit, "scalar", &HasAnything},
  };
  return {rows, sizeof(rows) / sizeof(rows[0])};
}

}  // namespace attn::kernels::cpu
