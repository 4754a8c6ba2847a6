// Which keys position, windows and the mask's extent let a query see. C headers only and always
// inlined, as page_layout.h.
#pragma once

#include "kernels/attention_args.h"

namespace attn::kernels {

// [begin, end); empty: 0, 0.
struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;
};

// Of query `i` of the sequence. Compares before it adds: a window may be as large as int64_t
// allows.
[[gnu::always_inline]] inline KeyRange VisibleKeys(const AttentionArgs& args,
                                                   const Sequence& sequence, int64_t i) {
  const int64_t position = sequence.first_query_position + i;
  KeyRange keys = {0, sequence.kv_len};
  if (args.mask.type != MaskType::kNone && args.mask.kv_extent < keys.end) {
    keys.end = args.mask.kv_extent;
  }
  if (args.is_causal && position < keys.end) keys.end = position + 1;
  if (args.window_right >= 0 && args.window_right < keys.end - 1 - position) {
    keys.end = position + args.window_right + 1;
  }
  if (args.window_left >= 0 && args.window_left < position) {
    keys.begin = position - args.window_left;
  }
  if (keys.end <= keys.begin) keys.begin = keys.end = 0;
  return keys;
}

// What any of the queries [first, last] sees: the smallest range that holds all of theirs.
[[gnu::always_inline]] inline KeyRange VisibleToAny(const AttentionArgs& args,
                                                    const Sequence& sequence, int64_t first,
                                                    int64_t last) {
  KeyRange all;
  for (int64_t i = first; i <= last; ++i) {
    const KeyRange keys = VisibleKeys(args, sequence, i);
    if (keys.end == 0) continue;
    if (all.end == 0 || keys.begin < all.begin) all.begin = keys.begin;
    if (keys.end > all.end) all.end = keys.end;
  }
  return all;
}

}  // namespace attn::kernels
