// Where a token's key and value lie in a page of the KV cache: the only place that knows. A page
// holds 64 tokens of one layer and KV head, keys, then values, in the order in which kernels stream
// them. The layout is a function of the backend (here: the CPU) and the cache's dtype, so that a
// cache outlives every switch of implementation or instruction set.
//
// Keys: 32-bit elements and float16 [head_dim][64]; bfloat16 [head_dim / 2][64][2], pairs of
// dimensions as dot-product instructions take them, an odd last one beside zeros. Values: 32-bit
// elements and float16 [64][value_dim]; bfloat16 [32][value_dim][2], pairs of tokens. C headers
// only, as attention_args.h; always inlined, so that units of an instruction set leave no symbol of
// it behind.
#pragma once

#include "kernels/attention_args.h"

namespace attn::kernels {

constexpr int64_t kPageTokens = 64;
constexpr int64_t kPageAlignment = 64;  // bytes, of keys and of values

struct PageLayout {
  ElementType dtype = ElementType::kFloat32;
  int64_t head_dim = 0;
  int64_t value_dim = 0;

  [[gnu::always_inline]] constexpr int64_t item_size() const {
    return dtype == ElementType::kFloat32 ? 4 : 2;
  }
  [[gnu::always_inline]] constexpr bool pairs() const { return dtype == ElementType::kBFloat16; }

  // Elements from the start of the keys.
  [[gnu::always_inline]] constexpr int64_t KeyElement(int64_t token, int64_t d) const {
    return pairs() ? (d / 2 * kPageTokens + token) * 2 + d % 2 : d * kPageTokens + token;
  }
  // Elements from the start of the values.
  [[gnu::always_inline]] constexpr int64_t ValueElement(int64_t token, int64_t c) const {
    return pairs() ? (token / 2 * value_dim + c) * 2 + token % 2 : token * value_dim + c;
  }
  // Dimensions that keys have room for.
  [[gnu::always_inline]] constexpr int64_t padded_head_dim() const {
    return pairs() ? (head_dim + 1) / 2 * 2 : head_dim;
  }
  // Bytes from the start of the page to its values; the whole page. 64 tokens fill whole lines.
  [[gnu::always_inline]] constexpr int64_t value_offset() const {
    return padded_head_dim() * kPageTokens * item_size();
  }
  [[gnu::always_inline]] constexpr int64_t page_bytes() const {
    return value_offset() + value_dim * kPageTokens * item_size();
  }
};

}  // namespace attn::kernels
