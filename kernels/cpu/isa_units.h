// What each unit that is compiled for an instruction set exports (isa_unit-inl.h).
#pragma once

#include "kernels/attention_args.h"
#include "kernels/cpu/flash_attention.h"
#include "kernels/cpu/page_packing.h"
#include "kernels/cpu/sparse_selection.h"

namespace attn::kernels {

namespace cpu {

// The kernels of one unit: what their names say in standard_attention.h, flash_attention.h and
// page_packing.h.
struct UnitKernels {
  // Flash multiplies in bfloat16 where queries and keys are bfloat16: the weights that values are
  // multiplied with are rounded to it (their sum is not).
  bool native_bfloat16;
  // Beside caches of int8, flash rounds queries and weights to int16, with a scale for each row.
  bool integer_products;
  void (*standard_attention)(const AttentionArgs&, int64_t task, void* workspace,
                             const bool* cancelled);
  void (*flash_attention)(const AttentionArgs&, const FlashPlan&, const FlashTask&, void* scratch,
                          float* partials, const bool* cancelled, FlashCounters*);
  void (*merge_flash)(const AttentionArgs&, const FlashTask&, float* partials);
  FlashCounters (*count_flash_pairs)(const AttentionArgs&);
  void (*summarize_keys)(const AttentionArgs&, const FlashPlan&, const FlashSummaryTask&,
                         void* scratch);
  SelectionResult (*select_pages)(const SelectionTask&, int32_t* pages, void* scratch);
  void (*pack_tokens)(const PageLayout&, const TokenRows&, PageRange, void* page);
  void (*unpack_tokens)(const PageLayout&, const void* page, PageRange, const MutableTokenRows&);
};

}  // namespace cpu

namespace avx512_bf16 {
extern const cpu::UnitKernels kUnit;
}
namespace avx512 {
extern const cpu::UnitKernels kUnit;
}
namespace avx2 {
extern const cpu::UnitKernels kUnit;
}
namespace scalar {
extern const cpu::UnitKernels kUnit;
}

}  // namespace attn::kernels
