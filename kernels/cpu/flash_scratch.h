// How the scratch memory of one flash task is divided: shared by the code that plans and the texts
// that run. C headers only and always inlined, as page_layout.h.
#pragma once

#include "kernels/cpu/flash_attention.h"
#include "kernels/page_layout.h"

namespace attn::kernels::cpu {

// Rows of a task come in multiples of it: whole register blocks of every instruction set.
constexpr int64_t kFlashRowMultiple = 12;
constexpr int64_t kFlashScoreStride =
    kFlashStepPages * kPageTokens + 16;  // floats, of a tile's rows

[[gnu::always_inline]] constexpr int64_t RoundUpTo(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Floats from one row of outputs to the next.
[[gnu::always_inline]] constexpr int64_t FlashOutputStride(int64_t value_dim) {
  return RoundUpTo(value_dim, 16);
}

// Floats of one row's partial result: its output, then its state.
[[gnu::always_inline]] constexpr int64_t FlashPartialStride(int64_t value_dim) {
  return FlashOutputStride(value_dim) + 16;
}

// Byte offsets of the parts.
struct FlashScratch {
  int64_t query = 0;    // packed in blocks, up to four bytes an element
  int64_t scores = 0;   // [tile_rows][kFlashScoreStride]
  int64_t output = 0;   // [rows][FlashOutputStride]: of the segment
  int64_t total = 0;    // the same, of the segments before it; only where a task merges
  int64_t product = 0;  // the same, of the step; of a tile
  int64_t states = 0;   // [rows] of the segment, then [rows] of the segments before it
  int64_t ranges = 0;   // [rows] visible keys
  int64_t pages = 0;    // of one step; only where keys are not paged
  int64_t bytes = 0;
};

struct FlashScratchShape {
  int64_t rows = 0;
  int64_t tile_rows = 0;
  bool merges_inside = false;
  bool packs = false;  // pages
  bool tight = false;
};

[[gnu::always_inline]] constexpr FlashScratch DivideFlashScratch(const AttentionArgs& args,
                                                                 const FlashScratchShape& shape) {
  const int64_t out_bytes = FlashOutputStride(args.value_dim) * 4;
  const int64_t head_dim = RoundUpTo(args.head_dim, 4);
  const PageLayout page = {ElementType::kFloat32, head_dim, args.value_dim};
  const int64_t keys = page.value_offset();
  const int64_t values = page.page_bytes() - keys;
  FlashScratch parts;
  parts.scores = RoundUpTo(shape.rows * head_dim * 4, 64);
  parts.output = parts.scores + RoundUpTo(shape.tile_rows * kFlashScoreStride * 4, 64);
  parts.total = parts.output + shape.rows * out_bytes;
  parts.product = parts.total + (shape.merges_inside ? shape.rows * out_bytes : 0);
  parts.states = parts.product + shape.tile_rows * out_bytes;
  parts.ranges = parts.states + RoundUpTo(shape.rows * 16, 64);
  parts.pages = parts.ranges + RoundUpTo(shape.rows * 16, 64);
  const int64_t packed =
      shape.tight ? (keys > values ? keys : values) : kFlashStepPages * (keys + values);
  parts.bytes = parts.pages + (shape.packs ? packed : 0);
  return parts;
}

}  // namespace attn::kernels::cpu
