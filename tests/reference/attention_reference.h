// Attention by the definition in kernels/attention_args.h: plain loops in double precision, one
// element at a time. It shares no code with any kernel, its conversions between element types
// included.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention_args.h"

namespace attn::reference {

// Of one sequence. The magnitudes are what rounding errors are proportional to, over keys that a
// row sees.
struct ReferenceResult {
  std::vector<double> output;    // [q_len, num_heads, value_dim]
  std::vector<double> lse;       // [q_len, num_heads]
  std::vector<double> weights;   // [num_heads, q_len, kv_len] at args.stage; empty: none
  double product_magnitude = 0;  // largest scale * sum |q_i k_i|
  double bias_magnitude = 0;     // largest |ALiBi| + |mask|
  double value_magnitude = 0;    // largest |v|
};

std::vector<ReferenceResult> AttentionReference(const kernels::AttentionArgs& args);

// Query `row` may look at `key`: position, the mask's extent, and the mask itself (false, and -inf,
// hide).
bool Sees(const kernels::AttentionArgs& args, const kernels::Sequence& sequence, int64_t head,
          int64_t row, int64_t key);

int64_t ElementBytes(kernels::ElementType type);
double ReadElement(kernels::ElementType type, const void* data, int64_t index);
// Rounds to nearest, ties to even; what is too large becomes infinite.
void WriteElement(double value, kernels::ElementType type, void* data, int64_t index);

}  // namespace attn::reference
