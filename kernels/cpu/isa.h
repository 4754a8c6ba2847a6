// Which instruction set the CPU kernels use: detected once, best first. The environment variable
// ATTN_FORCE_ISA (scalar, avx2, avx512) overrides the choice.
#pragma once

#include "kernels/attention_args.h"
#include "kernels/cpu/flash_attention.h"
#include "kernels/cpu/page_packing.h"

namespace attn::kernels::cpu {

// One row per compiled instruction set: its name and its kernels.
struct IsaKernels {
  const char* name;
  bool (*supported)();  // by this CPU and operating system
  void (*standard_attention)(const AttentionArgs&, int64_t task, void* workspace,
                             const bool* cancelled);
  void (*flash_attention)(const AttentionArgs&, const FlashPlan&, const FlashTask&, void* scratch,
                          float* partials, const bool* cancelled, FlashCounters*);
  void (*merge_flash)(const AttentionArgs&, const FlashTask&, float* partials);
  void (*pack_tokens)(const PageLayout&, const TokenRows&, PageRange, void* page);
  void (*unpack_tokens)(const PageLayout&, const void* page, PageRange, const MutableTokenRows&);
};

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
