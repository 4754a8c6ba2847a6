// Tokens into a page of the KV cache, and back into plain rows: what appends, and whoever needs
// rows (standard, torch_sdpa), call. Float16 and bfloat16 are rounded to nearest even; equal dtypes
// are copied bit by bit; other NaNs stay NaNs. Never fails, touches no token beyond those it is
// given.
//
// Int8 is symmetric, with a scale for each token's key and for each token's value: scale =
// max |x| / 127, element = x / scale to nearest even, so that an element is off by at most half a
// scale. A scale of 0 (zeros, and numbers below about 1e-43) stands for zeros. A token with an
// infinity or a NaN is not cut to what int8 can hold: its scale is NaN, and so is the result of
// every row that sees it.
#pragma once

#include "kernels/attention_args.h"
#include "kernels/page_layout.h"

namespace attn::kernels::cpu {

// Tokens of one head as rows, of any dtype but int8: element (token, i) of the keys at key + token
// * key_stride + i.
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

// Reads the range as rows of `rows.dtype`: the page's own or float32, of int8 pages float32.
void UnpackTokens(const PageLayout& layout, const void* page, PageRange range,
                  const MutableTokenRows& rows) noexcept;

}  // namespace attn::kernels::cpu
