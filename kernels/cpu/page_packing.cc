#include "kernels/cpu/page_packing.h"

#include "kernels/cpu/isa.h"

namespace attn::kernels::cpu {

void PackTokens(const PageLayout& layout, const TokenRows& rows, PageRange range,
                void* page) noexcept {
  ActiveIsa().pack_tokens(layout, rows, range, page);
}

void UnpackTokens(const PageLayout& layout, const void* page, PageRange range,
                  const MutableTokenRows& rows) noexcept {
  ActiveIsa().unpack_tokens(layout, page, range, rows);
}

}  // namespace attn::kernels::cpu
