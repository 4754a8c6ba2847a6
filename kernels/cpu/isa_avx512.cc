// The kernels' texts for AVX-512 (F, BW, DQ, VL). Flags of this instruction set: nothing is
// included whose inline functions could be linked into the rest of the program
// (tests/kernels/isa_symbols.sh).
#include <immintrin.h>

#include "kernels/attention_args.h"
#include "kernels/cpu/flash_scratch.h"
#include "kernels/cpu/isa_units.h"
#include "kernels/visible_keys.h"

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
#include "kernels/cpu/flash_tile-inl.h"
#include "kernels/cpu/flash_softmax-inl.h"
#include "kernels/cpu/flash_scores-inl.h"
#include "kernels/cpu/flash_values-inl.h"
#include "kernels/cpu/flash_attention-inl.h"
// clang-format on
}  // namespace

void StandardAttention(const AttentionArgs& args, int64_t task, void* workspace,
                       const bool* cancelled) {
  StandardAttentionTask(args, task, workspace, cancelled);
}

void FlashAttention(const AttentionArgs& args, const cpu::FlashPlan& plan,
                    const cpu::FlashTask& task, void* scratch, float* partials,
                    const bool* cancelled, cpu::FlashCounters* counters) {
  FlashAttentionTask(args, plan, task, scratch, partials, cancelled, counters);
}

void MergeFlashAttention(const AttentionArgs& args, const cpu::FlashTask& task, float* partials) {
  MergeFlash(args, task, partials);
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
