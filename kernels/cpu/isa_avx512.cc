// The kernels' texts for AVX-512 (F, BW, DQ, VL). Flags of this instruction set: nothing is
// included whose inline functions could be linked into the rest of the program
// (tests/kernels/isa_symbols.sh).
#include <immintrin.h>

#include "kernels/attention_args.h"
#include "kernels/cpu/isa_units.h"

#define ATTN_VEC_BYTES 64

namespace attn::kernels::avx512 {
namespace {
// Each text builds on the ones before it.
// clang-format off
#include "kernels/cpu/vec-inl.h"
#include "kernels/cpu/math-inl.h"
#include "kernels/cpu/score_row-inl.h"
#include "kernels/cpu/standard_attention-inl.h"
#include "kernels/cpu/page_packing-inl.h"
// clang-format on
}  // namespace

void StandardAttention(const AttentionArgs& args, int64_t task, void* workspace,
                       const bool* cancelled) {
  StandardAttentionTask(args, task, workspace, cancelled);
}

void PackTokens(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
                void* page) {
  PackTokensOfPage(layout, rows, range, page);
}

void UnpackTokens(const PageLayout& layout, const void* page, cpu::PageRange range,
                  const cpu::MutableTokenRows& rows) {
  UnpackTokensOfPage(layout, page, range, rows);
}

}  // namespace attn::kernels::avx512
