// Where a token's key and value lie in a page of the KV cache: the only place that knows. A page
// holds 64 tokens of one layer and KV head, keys, then values, in the order in which kernels stream
// them. The layout is a function of the backend (here: the CPU) and the cache's dtype, so that a
// cache outlives every switch of implementation or instruction set.
//
// Keys lie in panels of 16 tokens, values in panels of 16 columns, one behind the other, so that a
// kernel that takes one vector of AVX-512 or two of AVX2 at a time reads memory from front to back.
// Keys: float32 and float16 [4][head_dim][16]; bfloat16 [4][head_dim / 2][16][2], pairs of
// dimensions as dot-product instructions take them, an odd last one beside zeros; int8 [4][head_dim
// / 4][16][4], likewise in fours. Values, with value_dim rounded up to 16 and filled with zeros:
// float32 and float16 [value_dim / 16][64][16]; bfloat16 [value_dim / 16][32][16][2], pairs of
// tokens; int8 [value_dim / 16][16][16][4]. Int8 keys and int8 values are followed by 64 float
// scales of their own, one for each token: an element stands for itself times its token's scale. C
// headers only, as attention_args.h; always inlined, so that units of an instruction set leave no
// symbol of it behind.
#pragma once

#include "kernels/attention_args.h"

namespace attn::kernels {

constexpr int64_t kPageTokens = 64;
constexpr int64_t kPanelWidth = 16;     // tokens of a panel of keys, columns of one of values
constexpr int64_t kPageAlignment = 64;  // bytes, of keys, of values and of the scales behind them

struct PageLayout {
  ElementType dtype = ElementType::kFloat32;
  int64_t head_dim = 0;
  int64_t value_dim = 0;

  [[gnu::always_inline]] constexpr int64_t item_size() const {
    return dtype == ElementType::kFloat32 ? 4 : dtype == ElementType::kInt8 ? 1 : 2;
  }
  [[gnu::always_inline]] constexpr bool pairs() const { return dtype == ElementType::kBFloat16; }
  [[gnu::always_inline]] constexpr bool has_scales() const { return dtype == ElementType::kInt8; }
  // A key's dimensions, a value's tokens, that lie side by side.
  [[gnu::always_inline]] constexpr int64_t group() const {
    return dtype == ElementType::kInt8 ? 4 : pairs() ? 2 : 1;
  }

  // Elements from one panel to the next.
  [[gnu::always_inline]] constexpr int64_t key_panel() const {
    return padded_head_dim() * kPanelWidth;
  }
  [[gnu::always_inline]] constexpr int64_t value_panel() const { return kPageTokens * kPanelWidth; }

  // Elements from the start of the keys.
  [[gnu::always_inline]] constexpr int64_t KeyElement(int64_t token, int64_t d) const {
    return token / kPanelWidth * key_panel() +
           (d / group() * kPanelWidth + token % kPanelWidth) * group() + d % group();
  }
  // Elements from the start of the values.
  [[gnu::always_inline]] constexpr int64_t ValueElement(int64_t token, int64_t c) const {
    return c / kPanelWidth * value_panel() +
           (token / group() * kPanelWidth + c % kPanelWidth) * group() + token % group();
  }
  // Dimensions that keys have room for; those beyond head_dim are zeros.
  [[gnu::always_inline]] constexpr int64_t padded_head_dim() const {
    return (head_dim + group() - 1) / group() * group();
  }
  // Columns that values have room for; those beyond value_dim are zeros.
  [[gnu::always_inline]] constexpr int64_t padded_value_dim() const {
    return (value_dim + kPanelWidth - 1) / kPanelWidth * kPanelWidth;
  }
  // Bytes from the start of the keys to a token's scale (float); of caches with scales.
  [[gnu::always_inline]] constexpr int64_t KeyScale(int64_t token) const {
    return padded_head_dim() * kPageTokens * item_size() + token * scale_size();
  }
  // Bytes from the start of the values to a token's scale.
  [[gnu::always_inline]] constexpr int64_t ValueScale(int64_t token) const {
    return padded_value_dim() * kPageTokens * item_size() + token * scale_size();
  }
  // Bytes from the start of the page to its values; the whole page. 64 tokens fill whole lines.
  [[gnu::always_inline]] constexpr int64_t value_offset() const { return KeyScale(kPageTokens); }
  [[gnu::always_inline]] constexpr int64_t page_bytes() const {
    return value_offset() + ValueScale(kPageTokens);
  }

 private:
  [[gnu::always_inline]] constexpr int64_t scale_size() const { return has_scales() ? 4 : 0; }
};

}  // namespace attn::kernels
