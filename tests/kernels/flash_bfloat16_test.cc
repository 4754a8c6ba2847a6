// What it costs that flash rounds weights to bfloat16 where an instruction set multiplies in it:
// noise of the size of one rounding to nearest, no bias, nothing in the LSE; and that it is done
// where it is said to be done, nowhere else.
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "tests/kernels/flash_runner.h"
#include "tests/reference/attention_reference.h"
#include "tests/reference/expect_close.h"
#include "tests/reference/problem_builder.h"

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::cpu::FlashWeightType;
using kernels::cpu::IsaKernels;

// Attention spread over some thousand keys, so that roundings average out; the result unrounded.
ProblemCase LongCase(ElementType dtype) {
  ProblemCase c;
  c.heads = 4;
  c.kv_heads = 2;
  c.q_len = 13;
  c.kv_len = 5000;
  c.head_dim = c.value_dim = 64;
  c.dtype = dtype;
  c.lse = true;
  return c;
}

void SetValuesToOne(const AttentionArgs& args) {
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    for (int64_t i = 0; i < args.sequences[s].num_spans; ++i) {
      const kernels::KeyValueSpan& span = args.sequences[s].spans[i];
      for (int64_t at = 0; at < span.length * args.num_kv_heads * args.value_dim; ++at) {
        const int64_t token = at / args.value_dim / args.num_kv_heads;
        const int64_t head = at / args.value_dim % args.num_kv_heads;
        WriteElement(
            1, args.kv_dtype, const_cast<void*>(span.value.data),
            token * span.value.row_stride + head * span.value.head_stride + at % args.value_dim);
      }
    }
  }
}

struct Error {
  double relative_rms = 0;
  double mean = 0;
};

Error ErrorOf(const AttentionArgs& args, const ReferenceResult& expected) {
  const kernels::Sequence& sequence = args.sequences[0];
  double squares = 0;
  double size = 0;
  double sum = 0;
  std::size_t count = 0;
  for (int64_t row = 0; row < sequence.q_len; ++row) {
    for (int64_t head = 0; head < args.num_heads; ++head) {
      for (int64_t i = 0; i < args.value_dim; ++i, ++count) {
        const int64_t at =
            row * sequence.output.row_stride + head * sequence.output.head_stride + i;
        const double want = expected.output[count];
        const double error = ReadElement(args.output_dtype, sequence.output.data, at) - want;
        squares += error * error;
        size += want * want;
        sum += error;
      }
    }
  }
  return {std::sqrt(squares / size), sum / static_cast<double>(count)};
}

class FlashBFloat16Test : public testing::TestWithParam<const IsaKernels*> {};

TEST_P(FlashBFloat16Test, WeightsCostOneRounding) {
  for (const ElementType dtype :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    AttentionProblem problem(LongCase(dtype));
    RunFlash(*GetParam(), problem.args());
    const auto expected = AttentionReference(problem.args());
    const ElementType weights = FlashWeightType(*GetParam(), problem.args());
    EXPECT_TRUE(ExpectAttentionClose(problem.args(), expected, weights));
    const double error = ErrorOf(problem.args(), expected[0]).relative_rms;
    if (weights == ElementType::kBFloat16) {
      // Errors that are uniform within half a unit in the last place, of numbers whose fractions
      // are spread evenly over the exponents, have 1.6e-3; cut off instead of rounded: 3.2e-3.
      EXPECT_LT(error, 2.2e-3);
      EXPECT_GT(error, 8e-4) << "not rounded";
    } else {
      EXPECT_LT(error, 1e-5);
    }
    RecordProperty("relative_rms_" + std::to_string(static_cast<int>(dtype)),
                   std::to_string(error));
  }
}

TEST_P(FlashBFloat16Test, RoundedWeightsAddUpToOne) {
  AttentionProblem problem(LongCase(ElementType::kBFloat16));
  SetValuesToOne(problem.args());
  RunFlash(*GetParam(), problem.args());
  const Error error = ErrorOf(problem.args(), AttentionReference(problem.args())[0]);
  EXPECT_LT(error.relative_rms, 2e-4);
  EXPECT_LT(std::fabs(error.mean), 5e-5);  // cut off instead of rounded: 2.8e-3
}

INSTANTIATE_TEST_SUITE_P(Isa, FlashBFloat16Test, testing::ValuesIn(FlashIsas()),
                         [](const auto& test) { return std::string(test.param->name); });

}  // namespace
}  // namespace attn::reference
