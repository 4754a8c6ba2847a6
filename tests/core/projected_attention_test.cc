// A projected layer against plain loops in double precision that share no code with it: biases,
// grouped heads, query/key normalisation, padding, past and present, dtypes; and what it refuses.
#include "core/projected_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "core/error.h"
#include "tests/core/core_fixture.h"

namespace attn {
namespace {

constexpr std::int64_t kMaxTokens = 4096;
constexpr int kHidden = 24;
constexpr int kHeads = 4;
constexpr int kKvHeads = 2;
constexpr int kDim = 8;
constexpr int kValueDim = 6;
constexpr int kFeatures = (kHeads + kKvHeads) * kDim + kKvHeads * kValueDim;
constexpr int kAttended = kHeads * kValueDim;

using Vector = std::vector<double>;

Vector Random(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, 0.5);
  Vector values(count);
  for (double& value : values) value = static_cast<double>(static_cast<float>(normal(random)));
  return values;
}

std::vector<float> ToFloat(const Vector& values) { return {values.begin(), values.end()}; }

Parameter MakeParameter(const Vector& values, std::vector<std::int64_t> shape) {
  auto data = std::make_shared<std::vector<float>>(ToFloat(values));
  Parameter parameter;
  parameter.data = std::shared_ptr<const void>(data, data->data());
  parameter.dtype = DType::kFloat32;
  parameter.shape = std::move(shape);
  return parameter;
}

// The layer's parameters twice: as the module takes them, and as the reference reads them.
struct TestLayer {
  Vector weight = Random(kFeatures * kHidden, 1), bias = Random(kFeatures, 2);
  Vector out_weight = Random(kHidden * kAttended, 3), out_bias = Random(kHidden, 4);
  Vector query_norm = Random(kDim, 5), key_norm = Random(kDim, 6);
  bool biases = true;
  bool norms = false;
  bool causal = false;

  HostedLayer Hosted() const {
    LayerWeights weights;
    weights.query_key_value.weight = MakeParameter(weight, {kFeatures, kHidden});
    weights.output.weight = MakeParameter(out_weight, {kHidden, kAttended});
    if (biases) {
      weights.query_key_value.bias = MakeParameter(bias, {kFeatures});
      weights.output.bias = MakeParameter(out_bias, {kHidden});
    }
    if (norms) {
      weights.query_norm = MakeParameter(query_norm, {kDim});
      weights.key_norm = MakeParameter(key_norm, {kDim});
    }
    HostedLayer layer;
    LayerSpec spec;
    spec.num_heads = kHeads;
    spec.num_kv_heads = kKvHeads;
    spec.head_dim = kDim;
    spec.value_dim = kValueDim;
    spec.options.is_causal = causal;
    layer.spec = std::make_shared<const LayerSpec>(spec);
    layer.hidden_size = kHidden;
    layer.max_positions = 64;
    layer.weights = std::make_shared<const LayerWeights>(std::move(weights));
    return layer;
  }

  Vector Project(const double* x) const {
    Vector projected(kFeatures);
    for (int i = 0; i < kFeatures; ++i) {
      double sum = biases ? bias[static_cast<std::size_t>(i)] : 0.0;
      for (int j = 0; j < kHidden; ++j)
        sum += weight[static_cast<std::size_t>(i * kHidden + j)] * x[j];
      projected[static_cast<std::size_t>(i)] = sum;
    }
    for (int head = 0; norms && head < kHeads + kKvHeads; ++head) {
      double* const values = projected.data() + head * kDim;
      double square = 0.0;
      for (int d = 0; d < kDim; ++d) square += values[d] * values[d] / kDim;
      for (int d = 0; d < kDim; ++d) {
        const Vector& norm = head < kHeads ? query_norm : key_norm;
        values[d] *= norm[static_cast<std::size_t>(d)] / std::sqrt(square + 1e-6);
      }
    }
    return projected;
  }

  // One row of `count` tokens, all of which see all.
  Vector Forward(const Vector& hidden, int count, const std::vector<bool>& visible) const {
    std::vector<Vector> rows;
    for (int t = 0; t < count; ++t) rows.push_back(Project(hidden.data() + t * kHidden));
    Vector output(static_cast<std::size_t>(count * kHidden));
    for (int t = 0; t < count; ++t) {
      Vector attended(kAttended);
      for (int head = 0; head < kHeads; ++head) AttendHead(rows, t, head, visible, attended);
      for (int i = 0; i < kHidden; ++i) {
        double sum = biases ? out_bias[static_cast<std::size_t>(i)] : 0.0;
        for (int j = 0; j < kAttended; ++j) {
          sum += out_weight[static_cast<std::size_t>(i * kAttended + j)] *
                 attended[static_cast<std::size_t>(j)];
        }
        output[static_cast<std::size_t>(t * kHidden + i)] = sum;
      }
    }
    return output;
  }

  static void AttendHead(const std::vector<Vector>& rows, int t, int head,
                         const std::vector<bool>& visible, Vector& attended) {
    const int kv = head / (kHeads / kKvHeads);
    double denominator = 0.0;
    Vector weights(rows.size());
    for (std::size_t s = 0; s < rows.size(); ++s) {
      if (!visible[s]) continue;
      double score = 0.0;
      for (int d = 0; d < kDim; ++d) {
        score += rows[static_cast<std::size_t>(t)][static_cast<std::size_t>(head * kDim + d)] *
                 rows[s][static_cast<std::size_t>((kHeads + kv) * kDim + d)];
      }
      weights[s] = std::exp(score / std::sqrt(static_cast<double>(kDim)));
      denominator += weights[s];
    }
    for (std::size_t s = 0; s < rows.size(); ++s) {
      for (int d = 0; d < kValueDim; ++d) {
        const int at = (kHeads + kKvHeads) * kDim + kv * kValueDim + d;
        attended[static_cast<std::size_t>(head * kValueDim + d)] +=
            weights[s] / denominator * rows[s][static_cast<std::size_t>(at)];
      }
    }
  }
};

class ProjectedAttentionTest : public testing::TestWithParam<std::string> {
 protected:
  std::shared_ptr<const AttentionImplementation> Implementation() {
    return FindImplementation(BuiltInImplementations(), GetParam())->create();
  }

  // Plans and executes; the buffers live as long as the result.
  struct Result {
    absl::Status status;
    std::vector<float> output, present_key, present_value;
    std::size_t peak = 0;
    std::uint64_t flops = 0;
  };
  Result Run(const HostedLayer& layer, const ForwardInputs& inputs) {
    const ProjectedAttention module(layer, Implementation(), kMaxTokens);
    Result result;
    const auto plan = module.Plan(inputs);
    result.status = plan.status();
    if (!plan.ok()) return result;
    ForwardOutputs outputs;
    const auto bind = [](const OutputSpec& spec, std::vector<float>& values) {
      if (!spec.defined()) return MutableTensorView();
      values.assign(spec.bytes() / sizeof(float), std::nanf(""));
      return MutableTensorView(values.data(), spec.dtype, spec.shape.data(),
                               static_cast<int>(spec.shape.size()));
    };
    outputs.output = bind(plan->outputs.output, result.output);
    outputs.present_key = bind(plan->outputs.present_key, result.present_key);
    outputs.present_value = bind(plan->outputs.present_value, result.present_value);
    test_.Execute([&](ExecutionContext& context) {
      result.status = module.Forward(inputs, outputs, context);
      result.peak = context.workspace.meter().peak();
      result.flops = context.flops;
    });
    return result;
  }

  static void ExpectClose(const float* actual, const Vector& expected, double tolerance = 2e-5) {
    for (std::size_t i = 0; i < expected.size(); ++i)
      ASSERT_NEAR(actual[i], expected[i], tolerance) << i;
  }

  TestDevice test_;
};

TEST_P(ProjectedAttentionTest, MatchesTheReferenceWithAndWithoutBiasesAndNorms) {
  for (const auto& [biases, norms] :
       {std::pair(true, false), std::pair(false, false), std::pair(true, true)}) {
    TestLayer layer;
    layer.biases = biases;
    layer.norms = norms;
    const HostedLayer hosted = layer.Hosted();
    const Vector hidden = Random(2 * 5 * kHidden, 7);
    const std::vector<float> values = ToFloat(hidden);
    ForwardInputs inputs;
    inputs.hidden_states = TensorView(values.data(), DType::kFloat32, {2, 5, kHidden});
    const Result result = Run(hosted, inputs);
    ASSERT_TRUE(result.status.ok()) << result.status;
    for (int b = 0; b < 2; ++b) {
      const Vector row(hidden.begin() + b * 5 * kHidden, hidden.begin() + (b + 1) * 5 * kHidden);
      ExpectClose(result.output.data() + b * 5 * kHidden,
                  layer.Forward(row, 5, std::vector<bool>(5, true)));
    }
    EXPECT_GE(result.flops, 2u * 10 * kHidden * (kFeatures + kAttended));
  }
}

TEST_P(ProjectedAttentionTest, PaddingByMaskAndByLengths) {
  const TestLayer layer;
  const HostedLayer hosted = layer.Hosted();
  Vector hidden = Random(5 * kHidden, 8);
  std::vector<float> values = ToFloat(hidden);
  const Vector expected = layer.Forward(hidden, 5, {true, true, true, false, false});

  ForwardInputs inputs;
  inputs.hidden_states = TensorView(values.data(), DType::kFloat32, {1, 5, kHidden});
  const std::int64_t mask[] = {1, 1, 1, 0, 0};
  inputs.attention_mask = TensorView(mask, DType::kInt64, {1, 5});
  Result result = Run(hosted, inputs);
  ASSERT_TRUE(result.status.ok()) << result.status;
  ExpectClose(result.output.data(), expected);

  // By lengths padding is not looked at, whatever lies there, and its output is zero.
  std::fill(values.begin() + 3 * kHidden, values.end(), std::nanf(""));
  inputs.attention_mask = TensorView();
  inputs.query_lengths = {3};
  result = Run(hosted, inputs);
  ASSERT_TRUE(result.status.ok()) << result.status;
  ExpectClose(result.output.data(), Vector(expected.begin(), expected.begin() + 3 * kHidden));
  ExpectClose(result.output.data() + 3 * kHidden, Vector(2 * kHidden, 0.0), 0.0);

  inputs.hidden_states = TensorView(values.data(), DType::kFloat32, {3, kHidden});
  result = Run(hosted, inputs);
  ASSERT_TRUE(result.status.ok()) << result.status;
  ExpectClose(result.output.data(), Vector(expected.begin(), expected.begin() + 3 * kHidden));
}

TEST_P(ProjectedAttentionTest, PastAndPresentContinueARow) {
  TestLayer layer;
  layer.causal = true;
  const HostedLayer hosted = layer.Hosted();
  const Vector hidden = Random(6 * kHidden, 9);
  const std::vector<float> values = ToFloat(hidden);
  ForwardInputs inputs;
  inputs.hidden_states = TensorView(values.data(), DType::kFloat32, {1, 4, kHidden});
  inputs.use_cache = true;
  const Result first = Run(hosted, inputs);
  ASSERT_TRUE(first.status.ok()) << first.status;
  inputs.hidden_states = TensorView(values.data() + 4 * kHidden, DType::kFloat32, {1, 2, kHidden});
  inputs.past_key = TensorView(first.present_key.data(), DType::kFloat32, {1, kKvHeads, 4, kDim});
  inputs.past_value =
      TensorView(first.present_value.data(), DType::kFloat32, {1, kKvHeads, 4, kValueDim});
  const Result second = Run(hosted, inputs);
  ASSERT_TRUE(second.status.ok()) << second.status;
  const Vector expected =
      layer.Forward(hidden, 6, std::vector<bool>(6, true));  // the last token sees all
  ExpectClose(second.output.data() + kHidden,
              Vector(expected.begin() + 5 * kHidden, expected.end()));
  EXPECT_EQ(second.present_key.size(), static_cast<std::size_t>(kKvHeads * 6 * kDim));
}

TEST_P(ProjectedAttentionTest, HiddenStatesOfAnotherDtype) {
  const TestLayer layer;
  const HostedLayer hosted = layer.Hosted();
  const Vector hidden = Random(5 * kHidden, 10);
  std::vector<std::uint16_t> halves(hidden.size());
  const std::vector<float> values = ToFloat(hidden);
  for (std::size_t i = 0; i < halves.size(); ++i) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &values[i], sizeof(bits));
    halves[i] = static_cast<std::uint16_t>(bits >> 16);  // bfloat16, cut off
  }
  ForwardInputs inputs;
  inputs.hidden_states = TensorView(halves.data(), DType::kBFloat16, {1, 5, kHidden});
  const ProjectedAttention module(hosted, Implementation(), kMaxTokens);
  const auto plan = module.Plan(inputs);
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->outputs.output.dtype, DType::kBFloat16);
  std::vector<std::uint16_t> output(5 * kHidden);
  test_.Execute([&](ExecutionContext& context) {
    EXPECT_TRUE(
        module
            .Forward(
                inputs,
                {MutableTensorView(output.data(), DType::kBFloat16, {1, 5, kHidden}), {}, {}, {}},
                context)
            .ok());
  });
  const Vector expected = layer.Forward(hidden, 5, std::vector<bool>(5, true));
  for (std::size_t i = 0; i < output.size(); ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(output[i]) << 16;
    float value = 0.0f;
    std::memcpy(&value, &bits, sizeof(value));
    ASSERT_NEAR(value, expected[i], 0.05) << i;
  }
}

TEST_P(ProjectedAttentionTest, RefusesWhatDoesNotFitTheLayer) {
  const HostedLayer hosted = TestLayer().Hosted();
  const std::vector<float> values(70 * kHidden);
  const auto status = [&](const ForwardInputs& inputs) {
    return ProjectedAttention(hosted, nullptr, kMaxTokens).Plan(inputs).status();
  };
  ForwardInputs inputs;
  EXPECT_EQ(status(inputs).code(), absl::StatusCode::kInvalidArgument);
  inputs.hidden_states = TensorView(values.data(), DType::kFloat32, {1, 5, kHidden - 1});
  EXPECT_EQ(status(inputs).code(), absl::StatusCode::kInvalidArgument);
  inputs.hidden_states = TensorView(values.data(), DType::kFloat32, {5, kHidden});  // no lengths
  EXPECT_EQ(status(inputs).code(), absl::StatusCode::kInvalidArgument);
  inputs.hidden_states = TensorView(values.data(), DType::kFloat32, {1, 65, kHidden});
  EXPECT_EQ(status(inputs).code(), absl::StatusCode::kOutOfRange);
  inputs.hidden_states = TensorView(values.data(), DType::kFloat32, {1, 2, kHidden});
  std::int64_t ids[] = {0, 64};
  inputs.position_ids = TensorView(ids, DType::kInt64, {1, 2});
  EXPECT_EQ(status(inputs).code(), absl::StatusCode::kOutOfRange);
  ids[1] = -1;
  EXPECT_EQ(status(inputs).code(), absl::StatusCode::kInvalidArgument);
  ids[1] = 63;
  EXPECT_TRUE(status(inputs).ok());
  inputs.position_ids = TensorView(ids, DType::kInt64, {2, 1});
  EXPECT_EQ(status(inputs).code(), absl::StatusCode::kInvalidArgument);

  // Padding has no position.
  ids[1] = -1;
  inputs.position_ids = TensorView(ids, DType::kInt64, {1, 2});
  inputs.query_lengths = {1};
  EXPECT_TRUE(status(inputs).ok());
  inputs.position_ids = TensorView();
  inputs.hidden_states = TensorView(values.data(), DType::kFloat32, {1, 65, kHidden});
  inputs.query_lengths = {64};
  EXPECT_TRUE(status(inputs).ok());
}

TEST_P(ProjectedAttentionTest, MemoryUsageBoundsWhatWasHandedOut) {
  const HostedLayer hosted = TestLayer().Hosted();
  const std::vector<float> values = ToFloat(Random(3 * 20 * kHidden, 11));
  ForwardInputs inputs;
  inputs.hidden_states = TensorView(values.data(), DType::kFloat32, {3, 20, kHidden});
  const Result result = Run(hosted, inputs);
  ASSERT_TRUE(result.status.ok());
  const ProjectedAttention module(hosted, Implementation(), kMaxTokens);
  const MemoryUsage usage = module.MemoryUsage(module.Plan(inputs)->shape, 2);
  EXPECT_GT(result.peak, 0u);
  if (usage.exact) {
    EXPECT_EQ(result.peak, usage.bytes);
  } else {
    EXPECT_LE(result.peak, usage.bytes);
  }
}

INSTANTIATE_TEST_SUITE_P(Implementations, ProjectedAttentionTest,
                         testing::Values("standard", "torch_sdpa"),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace attn
