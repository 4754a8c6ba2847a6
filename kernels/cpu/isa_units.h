// What each unit that is compiled for an instruction set defines, and what it shares with the code
// that plans its work.
#pragma once

#include "kernels/attention_args.h"
#include "kernels/cpu/flash_attention.h"
#include "kernels/cpu/page_packing.h"

namespace attn::kernels {

// The widest panel of keys of any unit: what the standard kernel's workspace has room for.
constexpr int64_t kMaxPanelKeys = 64;

namespace scalar {
void FlashAttention(const AttentionArgs& args, const cpu::FlashPlan& plan,
                    const cpu::FlashTask& task, void* scratch, float* partials,
                    const bool* cancelled, cpu::FlashCounters* counters);
void MergeFlashAttention(const AttentionArgs& args, const cpu::FlashTask& task, float* partials);
void StandardAttention(const AttentionArgs& args, int64_t task, void* workspace,
                       const bool* cancelled);
void PackTokens(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
                void* page);
void UnpackTokens(const PageLayout& layout, const void* page, cpu::PageRange range,
                  const cpu::MutableTokenRows& rows);
}  // namespace scalar
namespace avx2 {
void FlashAttention(const AttentionArgs& args, const cpu::FlashPlan& plan,
                    const cpu::FlashTask& task, void* scratch, float* partials,
                    const bool* cancelled, cpu::FlashCounters* counters);
void MergeFlashAttention(const AttentionArgs& args, const cpu::FlashTask& task, float* partials);
void StandardAttention(const AttentionArgs& args, int64_t task, void* workspace,
                       const bool* cancelled);
void PackTokens(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
                void* page);
void UnpackTokens(const PageLayout& layout, const void* page, cpu::PageRange range,
                  const cpu::MutableTokenRows& rows);
}  // namespace avx2
namespace avx512 {
void FlashAttention(const AttentionArgs& args, const cpu::FlashPlan& plan,
                    const cpu::FlashTask& task, void* scratch, float* partials,
                    const bool* cancelled, cpu::FlashCounters* counters);
void MergeFlashAttention(const AttentionArgs& args, const cpu::FlashTask& task, float* partials);
void StandardAttention(const AttentionArgs& args, int64_t task, void* workspace,
                       const bool* cancelled);
void PackTokens(const PageLayout& layout, const cpu::TokenRows& rows, cpu::PageRange range,
                void* page);
void UnpackTokens(const PageLayout& layout, const void* page, cpu::PageRange range,
                  const cpu::MutableTokenRows& rows);
}  // namespace avx512

}  // namespace attn::kernels
