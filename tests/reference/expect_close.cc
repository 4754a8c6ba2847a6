#include "tests/reference/expect_close.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <string>

#include "kernels/page_layout.h"

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::ScoreStage;
using kernels::Sequence;

// Half a unit in the last place of a number near 1, and half the distance between the smallest
// numbers.
struct Rounding {
  double relative;
  double absolute;
  double largest;  // a larger number may become infinite
};

Rounding RoundingOf(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return {0x1p-24, 0x1p-126, 3.40e38};  // flushes subnormal numbers to zero
    case ElementType::kFloat16:
      return {0x1p-11, 0x1p-25, 65504};
    case ElementType::kBFloat16:
      return {0x1p-8, 0x1p-126, 3.38e38};
    case ElementType::kInt8:  // of pages alone: no result has it
      break;
  }
  return {};
}

// Absolute errors, before the result is rounded.
struct Tolerance {
  double scaled;       // of scale * q . k, capped or not
  double masked;       // of a score with its biases
  double probability;  // relative
  double output;
  double lse;
};

// Integers of a row go up to `largest`, and errors to half of one: independent ones, whose sum is
// measured by its standard deviation (1 / sqrt(3) of them for each) as everywhere here: 4 covers
// bad luck.
double IntegerError(double largest) { return 4 * 0.5 / largest; }

// Of a query's product with a key, relative to the row's largest element times the key's length.
// Sums of its products with int8 stay below 2^31, of up to 512 dimensions whatever the row is.
double QueryError(int64_t head_dim) {
  const double padded = 4 * std::ceil(static_cast<double>(head_dim) / 4);
  return IntegerError(std::min(32767.0, std::floor((0x1p31 - 1) / (127 * padded))));
}

// The length of the longest key of one KV head in pages of int8.
double LongestKey(const AttentionArgs& args, const Sequence& sequence, int64_t kv_head) {
  const kernels::PageLayout layout = {ElementType::kInt8, args.head_dim, args.value_dim};
  double longest = 0;
  for (int64_t token = sequence.pages.first_token; token < sequence.kv_len; ++token) {
    const char* const page =
        static_cast<const char*>(sequence.pages.blocks[token / kernels::kPageTokens]) +
        kv_head * sequence.pages.head_stride;
    const int64_t within = token % kernels::kPageTokens;
    float scale = 0;
    std::memcpy(&scale, page + layout.KeyScale(within), sizeof(scale));
    double squares = 0;
    for (int64_t d = 0; d < args.head_dim; ++d) {
      const auto element = static_cast<signed char>(page[layout.KeyElement(within, d)]);
      squares += static_cast<double>(element) * element;
    }
    const double length = scale * std::sqrt(squares);
    if (length > longest) longest = length;  // not for NaN, which is met exactly
  }
  return longest;
}

// What errors relative to a query's largest element do to its scores: scale * max |q_i| * |k|.
double QueryMagnitude(const AttentionArgs& args, const Sequence& sequence) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  double magnitude = 0;
  for (int64_t kv_head = 0; kv_head < args.num_kv_heads; ++kv_head) {
    const double longest = LongestKey(args, sequence, kv_head);
    for (int64_t row = 0; row < sequence.q_len; ++row) {
      for (int64_t i = 0; i < group * args.head_dim; ++i) {
        const int64_t head = kv_head * group + i / args.head_dim;
        const auto& query = sequence.query;
        const double element =
            ReadElement(args.dtype, query.data,
                        row * query.row_stride + head * query.head_stride + i % args.head_dim);
        const double product = std::fabs(static_cast<double>(args.scale) * element) * longest;
        if (product > magnitude) magnitude = product;
      }
    }
  }
  return magnitude;
}

// What rounded weights add to an output, relative to the largest value. In float32 they are what
// they are: their sums' rounding is all. As integers they have the unit of the largest one of
// their row and step of 256 keys; those of all steps add up to no more than 1.
double WeightError(ElementType weights, int64_t kv_len) {
  if (weights == ElementType::kFloat32) return 0;
  if (weights != ElementType::kInt8) return RoundingOf(weights).relative;
  return IntegerError(32767) * std::sqrt(std::min(256.0, static_cast<double>(kv_len)));
}

Tolerance ToleranceOf(const AttentionArgs& args, const Sequence& sequence,
                      const ReferenceResult& result, ElementType weights) {
  constexpr double kEpsilon = 0x1p-23;
  // Errors of a sum of n terms grow like its square root, not like n; 4 covers the operations
  // around it and bad luck.
  const double dot = kEpsilon * (4 + std::sqrt(static_cast<double>(args.head_dim)));
  const double sum = kEpsilon * (8 + std::sqrt(static_cast<double>(sequence.kv_len)));
  Tolerance tolerance;
  tolerance.scaled = dot * result.product_magnitude;
  if (weights == ElementType::kInt8) {
    tolerance.scaled += QueryError(args.head_dim) * QueryMagnitude(args, sequence);
  }
  tolerance.masked = tolerance.scaled + 4 * kEpsilon * result.bias_magnitude;
  tolerance.probability = 2 * tolerance.masked + sum;
  tolerance.output =
      (tolerance.probability + WeightError(weights, sequence.kv_len)) * result.value_magnitude;
  tolerance.lse = tolerance.masked + sum;
  return tolerance;
}

// The element that exceeds its tolerance by the largest factor.
class Worst {
 public:
  void Compare(const std::string& what, double actual, double expected, double tolerance,
               const Rounding& rounding) {
    ++compared_;
    const double allowed =
        tolerance + rounding.relative * (std::fabs(expected) + tolerance) + rounding.absolute;
    double factor = std::fabs(actual - expected) / allowed;
    if (std::isnan(expected) || std::isinf(expected)) {
      const bool same = std::isnan(expected) ? std::isnan(actual) : actual == expected;
      factor = same ? 0 : HUGE_VAL;
    } else if (std::isinf(actual) && std::signbit(actual) == std::signbit(expected) &&
               std::fabs(expected) + allowed >= rounding.largest) {
      factor = 0;
    } else if (std::isnan(factor)) {
      factor = HUGE_VAL;
    }
    if (factor > 1) ++failures_;
    if (factor <= factor_) return;
    factor_ = factor;
    std::ostringstream text;
    text.precision(9);
    text << what << " is " << actual << ", expected " << expected << " +- " << allowed << " ("
         << factor << " times the tolerance)";
    text_ = text.str();
  }

  testing::AssertionResult Verdict() const {
    if (failures_ == 0) return testing::AssertionSuccess();
    return testing::AssertionFailure()
           << failures_ << " of " << compared_ << " numbers differ; the worst: " << text_;
  }

 private:
  double factor_ = 0;
  std::string text_;
  int64_t failures_ = 0;
  int64_t compared_ = 0;
};

std::string At(const char* name, int64_t b, const char* axes, int64_t x, int64_t y, int64_t z) {
  std::ostringstream text;
  text << name << "[sequence " << b << "][" << axes << " " << x << ", " << y;
  if (z >= 0) text << ", " << z;
  text << "]";
  return text.str();
}

void CompareRows(const AttentionArgs& args, int64_t b, const ReferenceResult& expected,
                 ElementType weights, Worst* worst) {
  const Sequence& sequence = args.sequences[b];
  const Tolerance tolerance = ToleranceOf(args, sequence, expected, weights);
  const Rounding rounding = RoundingOf(args.output_dtype);
  for (int64_t row = 0; row < sequence.q_len; ++row) {
    for (int64_t head = 0; head < args.num_heads; ++head) {
      const int64_t at = row * args.num_heads + head;
      for (int64_t i = 0; i < args.value_dim; ++i) {
        const auto& output = sequence.output;
        const double actual = ReadElement(args.output_dtype, output.data,
                                          row * output.row_stride + head * output.head_stride + i);
        worst->Compare(At("output", b, "row, head, column", row, head, i), actual,
                       expected.output[static_cast<std::size_t>(at * args.value_dim + i)],
                       tolerance.output, rounding);
      }
      if (sequence.lse == nullptr) continue;
      const double actual =
          ReadElement(ElementType::kFloat32, sequence.lse,
                      row * sequence.lse_row_stride + head * sequence.lse_head_stride);
      worst->Compare(At("lse", b, "row, head", row, head, -1), actual,
                     expected.lse[static_cast<std::size_t>(at)], tolerance.lse,
                     RoundingOf(ElementType::kFloat32));
    }
  }
}

void CompareWeights(const AttentionArgs& args, int64_t b, const ReferenceResult& expected,
                    Worst* worst) {
  const Sequence& sequence = args.sequences[b];
  if (args.stage == ScoreStage::kNone || sequence.weights == nullptr) return;
  const Tolerance tolerance = ToleranceOf(args, sequence, expected, ElementType::kFloat32);
  const Rounding rounding = RoundingOf(args.output_dtype);
  for (int64_t head = 0; head < args.num_heads; ++head) {
    for (int64_t row = 0; row < sequence.q_len; ++row) {
      for (int64_t key = 0; key < sequence.kv_len; ++key) {
        const double actual = ReadElement(
            args.output_dtype, sequence.weights,
            head * sequence.weights_head_stride + row * sequence.weights_row_stride + key);
        const double wanted = expected.weights[static_cast<std::size_t>(
            (head * sequence.q_len + row) * sequence.kv_len + key)];
        const double allowed = args.stage == ScoreStage::kProbabilities
                                   ? tolerance.probability * std::fabs(wanted)
                               : args.stage == ScoreStage::kMasked ? tolerance.masked
                                                                   : tolerance.scaled;
        worst->Compare(At("weights", b, "head, row, key", head, row, key), actual, wanted, allowed,
                       rounding);
      }
    }
  }
}

}  // namespace

testing::AssertionResult ExpectAttentionClose(const AttentionArgs& args,
                                              const std::vector<ReferenceResult>& expected,
                                              ElementType weights) {
  if (static_cast<int64_t>(expected.size()) != args.num_sequences) {
    return testing::AssertionFailure() << "the reference has " << expected.size() << " sequences";
  }
  Worst worst;
  for (int64_t b = 0; b < args.num_sequences; ++b) {
    const ReferenceResult& result = expected[static_cast<std::size_t>(b)];
    CompareRows(args, b, result, weights, &worst);
    CompareWeights(args, b, result, &worst);
  }
  return worst.Verdict();
}

}  // namespace attn::reference
