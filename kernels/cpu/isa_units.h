// What each unit that is compiled for an instruction set defines, and what it shares with the code
// that plans its work.
#pragma once

#include "kernels/attention_args.h"

namespace attn::kernels {

// The widest panel of keys of any unit: what the standard kernel's workspace has room for.
constexpr int64_t kMaxPanelKeys = 64;

namespace scalar {
void StandardAttention(const AttentionArgs& args, int64_t task, void* workspace,
                       const bool* cancelled);
}
namespace avx2 {
void StandardAttention(const AttentionArgs& args, int64_t task, void* workspace,
                       const bool* cancelled);
}
namespace avx512 {
void StandardAttention(const AttentionArgs& args, int64_t task, void* workspace,
                       const bool* cancelled);
}

}  // namespace attn::kernels
