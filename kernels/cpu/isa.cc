// Detection, compiled without the flags of any instruction set.
#include "kernels/cpu/isa.h"

#include <cpuid.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/isa_units.h"

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
bool HasAnything() { return true; }

constexpr IsaKernels kRows[] = {
    {"avx512", &HasAvx512, &avx512::StandardAttention, &avx512::FlashAttention,
     &avx512::MergeFlashAttention, &avx512::PackTokens, &avx512::UnpackTokens},
    {"avx2", &HasAvx2, &avx2::StandardAttention, &avx2::FlashAttention, &avx2::MergeFlashAttention,
     &avx2::PackTokens, &avx2::UnpackTokens},
    {"scalar", &HasAnything, &scalar::StandardAttention, &scalar::FlashAttention,
     &scalar::MergeFlashAttention, &scalar::PackTokens, &scalar::UnpackTokens},
};
constexpr int64_t kNumRows = sizeof(kRows) / sizeof(kRows[0]);

const IsaChoice& Chosen() {
  static const IsaChoice choice = ChooseIsa(getenv("ATTN_FORCE_ISA"));
  return choice;
}

}  // namespace

IsaTable CompiledIsas() noexcept { return {kRows, kNumRows}; }

IsaChoice ChooseIsa(const char* forced) noexcept {
  __builtin_cpu_init();
  const bool any = forced == nullptr || *forced == '\0';
  IsaChoice choice = {&kRows[kNumRows - 1], "ATTN_FORCE_ISA must be one of avx512, avx2, scalar"};
  for (const IsaKernels& row : kRows) {
    if (!any && strcmp(row.name, forced) != 0) continue;
    if (row.supported()) return {&row, nullptr};
    choice.error = "ATTN_FORCE_ISA names an instruction set that this CPU does not have";
  }
  return choice;
}

const IsaKernels& ActiveIsa() noexcept { return *Chosen().row; }

const char* ForcedIsaError() noexcept { return Chosen().error; }

}  // namespace attn::kernels::cpu
