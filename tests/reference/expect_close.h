// The one place that says how near to the reference an exact implementation has to be.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "kernels/attention_args.h"
#include "tests/reference/attention_reference.h"

namespace attn::reference {

// Compares what a kernel wrote for `args` (output; LSE and weights where they were asked for) with
// the reference. The tolerance follows the arithmetic, float32 sums of head_dim and of kv_len
// terms: errors of a score are proportional to the magnitude of the terms it was summed from,
// relative errors of a probability to the error of its score, and the result is rounded once to
// output_dtype. NaN and infinity must be met exactly. A failure names the worst element.
//
// `weights`: what a probability (by any factor that its row has in common) is rounded to before it
// is multiplied with its value, while the sum of them and the LSE stay as they are. Of a row whose
// probabilities add up to 1 the output then is off by up to half a unit in the last place of its
// largest value. kInt8: what lies beside elements of int8 is rounded to int16, queries relative to
// their row's largest element, weights to the largest one of their row within 256 keys.
testing::AssertionResult ExpectAttentionClose(
    const kernels::AttentionArgs& args, const std::vector<ReferenceResult>& expected,
    kernels::ElementType weights = kernels::ElementType::kFloat32);

}  // namespace attn::reference
