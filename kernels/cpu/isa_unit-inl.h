// What a unit of an instruction set consists of: the kernels' texts in a namespace of their own,
// and the table of them that it exports. A unit (isa_<name>.cc) includes this once, after its
// intrinsics and these macros: ATTN_ISA, the name of the namespace; ATTN_VEC_BYTES, the width of a
// vector; ATTN_NATIVE_BF16, where vdpbf16ps is there. Units have flags of their instruction set:
// nothing is included whose inline functions could be linked into the rest of the program
// (tests/kernels/isa_symbols.sh).
#include "kernels/attention_args.h"
#include "kernels/cpu/flash_scratch.h"
#include "kernels/cpu/isa_units.h"
#include "kernels/cpu/sparse_selection.h"
#include "kernels/cpu/standard_scratch.h"
#include "kernels/visible_keys.h"

namespace attn::kernels::ATTN_ISA {
namespace {
// Each text builds on the ones before it.
// clang-format off
#include "kernels/cpu/vec-inl.h"
#include "kernels/cpu/math-inl.h"
#include "kernels/cpu/score_row-inl.h"
#include "kernels/cpu/page_packing-inl.h"
#include "kernels/cpu/flash_tile-inl.h"
#include "kernels/cpu/flash_tile_int8-inl.h"
#ifdef ATTN_NATIVE_BF16
#include "kernels/cpu/flash_tile_bf16-inl.h"
#endif
#include "kernels/cpu/flash_softmax-inl.h"
#include "kernels/cpu/flash_scores-inl.h"
#include "kernels/cpu/flash_values-inl.h"
#include "kernels/cpu/standard_attention-inl.h"
#include "kernels/cpu/standard_rows-inl.h"
#include "kernels/cpu/flash_pages-inl.h"
#include "kernels/cpu/page_summary-inl.h"
#include "kernels/cpu/page_weights-inl.h"
#include "kernels/cpu/sparse_selection-inl.h"
#include "kernels/cpu/flash_sparse-inl.h"
#include "kernels/cpu/flash_attention-inl.h"
// clang-format on
}  // namespace

extern const cpu::UnitKernels kUnit = {
#ifdef ATTN_NATIVE_BF16
    true,
#else
    false,
#endif
    kScalesRows<ProductsOfInt8>,
    &StandardAttentionTask,
    &FlashAttentionTask,
    &MergeFlash,
    &CountFlashPairs,
    &SummarizeKeysOfTask,
    &SelectPages,
    &PackTokensOfPage,
    &UnpackTokensOfPage,
};

}  // namespace attn::kernels::ATTN_ISA
