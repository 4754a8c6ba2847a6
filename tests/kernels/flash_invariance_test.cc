// A row's bits do not depend on the rows beside it, nor on how many queries a call brings: alone or
// in company, as one prefill, in chunks or one by one.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "tests/conformance/paged_problem.h"
#include "tests/kernels/flash_runner.h"
#include "tests/kernels/problem_parts.h"
#include "tests/reference/problem_builder.h"

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::MaskType;
using kernels::cpu::FlashOptions;
using kernels::cpu::IsaKernels;

// Options whose rounding could depend on where a block, a step or a chunk begins.
std::vector<ProblemCase> Options() {
  ProblemCase c;
  c.heads = 2;
  c.q_len = 108;
  c.kv_len = 5000;  // three segments
  c.head_dim = 18;
  c.value_dim = 21;
  c.causal = true;
  c.lse = true;
  std::vector<ProblemCase> cases = {c};
  c.window_left = 100;
  c.sinks = true;
  cases.push_back(c);
  c.window_left = 3000;
  c.alibi = true;
  c.sinks = false;
  cases.push_back(c);
  c.window_left = -1;
  c.soft_cap = 3;
  c.sinks = true;
  cases.push_back(c);
  c.alibi = false;
  c.logit_magnitude = 60;  // rows are rescaled
  c.soft_cap = 0;
  c.first_query_position = 2000;  // over the border of a segment, most keys ahead
  cases.push_back(c);
  return cases;
}

void ExpectChunksHaveTheBitsOfTheWhole(const IsaKernels& isa, const AttentionArgs& whole,
                                       const std::vector<int64_t>& sizes) {
  PoisonResults(whole);
  RunFlash(isa, whole, {2, 0, false});
  const std::vector<char> bits = ResultBits(whole);
  const std::vector<FlashOptions> cuts = FlashCuts();
  std::size_t cut = 0;
  for (const int64_t rows : sizes) {
    PoisonResults(whole);
    for (int64_t s = 0; s < whole.num_sequences; ++s) {
      for (const ProblemPart& chunk : ChunksOf(whole, s, rows)) {
        const ProblemParts alone(whole, {chunk});
        RunFlash(isa, alone.args(), cuts[cut++ % cuts.size()]);
      }
    }
    EXPECT_TRUE(ResultBits(whole) == bits) << "chunks of " << rows;
  }
}

class FlashInvarianceTest : public testing::TestWithParam<const IsaKernels*> {};

INSTANTIATE_TEST_SUITE_P(Isa, FlashInvarianceTest, testing::ValuesIn(FlashIsas()),
                         [](const auto& test) { return std::string(test.param->name); });

TEST_P(FlashInvarianceTest, ChunksOverPages) {
  for (const ElementType cache :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16, ElementType::kInt8}) {
    for (ProblemCase c : Options()) {
      c.dtype = cache == ElementType::kInt8 ? ElementType::kBFloat16 : cache;
      SCOPED_TRACE(CaseName(c) + "_cache" + std::to_string(static_cast<int>(cache)));
      const PagedProblem problem(c, cache, c.window_left >= 0);
      ExpectChunksHaveTheBitsOfTheWhole(*GetParam(), problem.args(), {1, 7, 64, 100});
    }
  }
}

TEST_P(FlashInvarianceTest, PrefillFromTheStartInChunks) {
  for (const ElementType cache : {ElementType::kBFloat16, ElementType::kInt8}) {
    ProblemCase c;
    c.heads = 2;
    c.q_len = c.kv_len = 2200;
    c.head_dim = c.value_dim = 16;
    c.causal = true;
    c.window_left = cache == ElementType::kInt8 ? 150 : -1;
    c.dtype = ElementType::kBFloat16;
    const PagedProblem problem(c, cache, false);
    ExpectChunksHaveTheBitsOfTheWhole(*GetParam(), problem.args(), {64, 700, 2191});
  }
}

TEST_P(FlashInvarianceTest, ChunksOverPlainRows) {
  for (const ElementType dtype :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    for (ProblemCase c : Options()) {
      c.q_len = 20;
      c.dtype = c.output_dtype = dtype;
      for (const int64_t spans : {1, 3}) {
        c.spans = spans;
        c.causal = spans == 1;
        SCOPED_TRACE(CaseName(c));
        AttentionProblem problem(c);
        ExpectChunksHaveTheBitsOfTheWhole(*GetParam(), problem.args(), {1, 7});
      }
    }
  }
}

TEST_P(FlashInvarianceTest, ChunksUnderAMask) {
  for (const MaskType mask : {MaskType::kBool, MaskType::kFloat32}) {
    ProblemCase c = Options()[0];
    c.q_len = 40;
    c.mask = mask;
    c.mask_rank = 3;
    c.causal = mask == MaskType::kBool;
    AttentionProblem problem(c);
    ExpectChunksHaveTheBitsOfTheWhole(*GetParam(), problem.args(), {1, 7, 13});
  }
}

// Six sequences of differing lengths.
ProblemCase Ragged() {
  ProblemCase c;
  c.batch = 6;
  c.heads = 8;
  c.kv_heads = 4;
  c.q_len = 30;
  c.kv_len = 2300;
  c.head_dim = 12;
  c.value_dim = 20;
  c.causal = true;
  c.ragged = true;
  c.lse = true;
  return c;
}

// In this order, in one call.
std::vector<ProblemPart> Sequences(const AttentionArgs& args, const std::vector<int64_t>& order) {
  std::vector<ProblemPart> parts;
  for (const int64_t sequence : order) parts.push_back(WholeSequence(args, sequence));
  return parts;
}

void ExpectNoInfluenceOfCompany(const IsaKernels& isa, const AttentionArgs& whole) {
  PoisonResults(whole);
  RunFlash(isa, whole);
  const std::vector<char> bits = ResultBits(whole);
  const auto run = [&](const std::vector<std::vector<int64_t>>& calls, const FlashOptions& cut) {
    PoisonResults(whole);
    for (const std::vector<int64_t>& call : calls) {
      const ProblemParts parts(whole, Sequences(whole, call));
      RunFlash(isa, parts.args(), cut);
    }
    EXPECT_TRUE(ResultBits(whole) == bits)
        << calls.size() << " calls, " << testing::PrintToString(cut);
  };
  for (const FlashOptions& cut : {FlashOptions{2, 24}, FlashOptions{64}}) {
    run({{0}, {1}, {2}, {3}, {4}, {5}}, cut);
    run({{5, 4, 3, 2, 1, 0}}, cut);
    run({{3, 0}, {1}, {5, 2, 4}}, cut);
  }
  for (const int64_t heads : {1, 3}) {
    PoisonResults(whole);
    for (int64_t head = 0; head < whole.num_kv_heads; head += heads) {
      const ProblemParts parts(whole, Sequences(whole, {0, 1, 2, 3, 4, 5}), head,
                               std::min(head + heads, whole.num_kv_heads));
      RunFlash(isa, parts.args(), {2});
    }
    EXPECT_TRUE(ResultBits(whole) == bits) << heads << " KV heads at a time";
  }
}

TEST_P(FlashInvarianceTest, SequencesAndHeadsAloneOrInCompany) {
  for (const ElementType dtype : {ElementType::kFloat32, ElementType::kBFloat16}) {
    ProblemCase c = Ragged();
    c.dtype = dtype;
    AttentionProblem plain(c);
    ExpectNoInfluenceOfCompany(*GetParam(), plain.args());
    c.alibi = c.sinks = true;
    c.window_left = 500;
    const PagedProblem paged(c, dtype, true);
    ExpectNoInfluenceOfCompany(*GetParam(), paged.args());
    const PagedProblem quantised(c, ElementType::kInt8, false);
    ExpectNoInfluenceOfCompany(*GetParam(), quantised.args());
  }
}

TEST_P(FlashInvarianceTest, MaskedSequencesAloneOrInCompany) {
  ProblemCase c = Ragged();
  c.mask = MaskType::kBFloat16;
  c.kv_len = 600;
  c.q_len = 9;
  AttentionProblem problem(c);
  ExpectNoInfluenceOfCompany(*GetParam(), problem.args());
}

}  // namespace
}  // namespace attn::reference
