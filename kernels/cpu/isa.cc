// Which of the compiled instruction sets is used.
#include "kernels/cpu/isa.h"

#include <stdlib.h>
#include <string.h>

namespace attn::kernels::cpu {
namespace {

const IsaChoice& Chosen() {
  static const IsaChoice choice = ChooseIsa(getenv("ATTN_FORCE_ISA"));
  return choice;
}

}  // namespace

IsaChoice ChooseIsa(const char* forced) noexcept {
  const IsaTable table = CompiledIsas();
  const bool any = forced == nullptr || *forced == '\0';
  IsaChoice choice = {&table.rows[table.size - 1],
                      "ATTN_FORCE_ISA must be one of avx512_bf16, avx512, avx2, scalar"};
  for (int64_t i = 0; i < table.size; ++i) {
    const IsaKernels& row = table.rows[i];
    if (!any && strcmp(row.name, forced) != 0) continue;
    if (row.supported()) return {&row, nullptr};
    choice.error = "ATTN_FORCE_ISA names an instruction set that this CPU does not have";
  }
  return choice;
}

const IsaKernels& ActiveIsa() noexcept { return *Chosen().row; }

const char* ForcedIsaError() noexcept { return Chosen().error; }

}  // namespace attn::kernels::cpu
