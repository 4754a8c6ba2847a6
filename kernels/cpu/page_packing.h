// Tokens into a page of the KV cache, and back into plain rows: what appends, and whoever needs
// rows (standard, torch_sdpa), call. Float16 and bfloat16 are rounded to nearest even; equal dtypes
// are copied bit by bit. Never fails, touches no token beyond those it is given.
#pragma once

#include "kernels/attention_args.h"
#include "kernels/page_layout.h"

namespace attn::kernels::cpu {

// Tokens of one head as rows: element (token, i) of the keys at key + token * key_stride + i.
struct TokenRows {
  ElementType dtype = ElementType::kFloat32;
  const void* key = nullptr;
  const void* value = nullptr;
  int64_t key_stride = 0;  // elements
  int64_t value_stride = 0;
};
struct MutableTokenRows {
  ElementType dtype = ElementType::kFloat32;
  void* key = nullptr;
  void* value = nullptr;
  int64_t key_stride = 0;
  int64_t value_stride = 0;
};

// Tokens [first, first + count) of a page.
struct PageRange {
  int64_t first = 0;
  int64_t count = 0;
};

// Writes the first range.count rows into the page.
void PackTokens(const PageLayout& layout, const TokenRows& rows, PageRange range,
                void* page) noexcept;

// Reads the range as rows of `rows.dtype`, which is the page's own or float32.
void UnpackTokens(const PageLayout& layout, const void* page, PageRange range,
                  const MutableTokenRows& rows) noexcept;

}  // namespace attn::kernels::cpu
