// Cross-attention of a projected layer against plain loops in double precision that share no code
// with it: an encoder of another width, grouped heads, normalised queries and keys, masks over the
// encoder's keys, rows of differing lengths in every layout, past and present; and what it refuses.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "core/error.h"
#include "core/projected_attention.h"
#include "tests/core/core_fixture.h"

namespace attn {
namespace {

constexpr std::int64_t kMaxTokens = 4096;
constexpr int kHidden = 24;
constexpr int kEncoder = 20;
constexpr int kHeads = 4;
constexpr int kKvHeads = 2;
constexpr int kDim = 8;
constexpr int kValueDim = 6;
constexpr int kQueries = kHeads * kDim;
constexpr int kKeyValues = kKvHeads * (kDim + kValueDim);
constexpr int kAttended = kHeads * kValueDim;

using Vector = std::vector<double>;

Vector Random(int count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, 0.5);
  Vector values(static_cast<std::size_t>(count));
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

// y = W x + b, in double precision.
Vector Project(const Vector& weight, const Vector& bias, const double* x, int columns) {
  Vector y = bias;
  for (std::size_t i = 0; i < y.size(); ++i) {
    for (int j = 0; j < columns; ++j) {
      y[i] += weight[i * static_cast<std::size_t>(columns) + static_cast<std::size_t>(j)] * x[j];
    }
  }
  return y;
}

void Normalize(double* head, const Vector& norm) {
  double square = 0.0;
  for (int d = 0; d < kDim; ++d) square += head[d] * head[d] / kDim;
  for (int d = 0; d < kDim; ++d)
    head[d] *= norm[static_cast<std::size_t>(d)] / std::sqrt(square + 1e-6);
}

// The layer's parameters twice: as the module takes them, and as the reference reads them.
struct CrossLayer {
  Vector query = Random(kQueries * kHidden, 1), query_bias = Random(kQueries, 2);
  Vector key_value = Random(kKeyValues * kEncoder, 3), key_value_bias = Random(kKeyValues, 4);
  Vector output = Random(kHidden * kAttended, 5), output_bias = Random(kHidden, 6);
  Vector query_norm = Random(kDim, 7), key_norm = Random(kDim, 8);
  bool norms = false;

  HostedLayer Hosted() const {
    LayerWeights weights;
    weights.query_key_value = {MakeParameter(query, {kQueries, kHidden}),
                               MakeParameter(query_bias, {kQueries})};
    weights.key_value = {MakeParameter(key_value, {kKeyValues, kEncoder}),
                         MakeParameter(key_value_bias, {kKeyValues})};
    weights.output = {MakeParameter(output, {kHidden, kAttended}),
                      MakeParameter(output_bias, {kHidden})};
    if (norms) {
      weights.query_norm = MakeParameter(query_norm, {kDim});
      weights.key_norm = MakeParameter(key_norm, {kDim});
    }
    LayerSpec spec;
    spec.num_heads = kHeads;
    spec.num_kv_heads = kKvHeads;
    spec.head_dim = kDim;
    spec.value_dim = kValueDim;
    spec.encoder_hidden_size = kEncoder;
    HostedLayer layer;
    layer.spec = std::make_shared<const LayerSpec>(spec);
    layer.kind = AttentionKind::kCross;
    layer.hidden_size = kHidden;
    layer.max_positions = 4;
    layer.weights = std::make_shared<const LayerWeights>(std::move(weights));
    return layer;
  }

  // One row: `hidden` of q tokens, `encoder` of the keys, of which `visible` (empty: all) are seen.
  Vector Forward(const Vector& hidden, const Vector& encoder,
                 const std::vector<bool>& visible = {}) const {
    std::vector<Vector> keys;
    for (std::size_t t = 0; t < encoder.size(); t += kEncoder) {
      keys.push_back(Project(key_value, key_value_bias, encoder.data() + t, kEncoder));
      for (int h = 0; norms && h < kKvHeads; ++h)
        Normalize(keys.back().data() + h * kDim, key_norm);
    }
    Vector result;
    for (std::size_t t = 0; t < hidden.size(); t += kHidden) {
      Vector q = Project(query, query_bias, hidden.data() + t, kHidden);
      for (int h = 0; norms && h < kHeads; ++h) Normalize(q.data() + h * kDim, query_norm);
      Vector attended(kAttended);
      for (int h = 0; h < kHeads; ++h) Attend(q.data() + h * kDim, keys, h, visible, attended);
      const Vector row = Project(output, output_bias, attended.data(), kAttended);
      result.insert(result.end(), row.begin(), row.end());
    }
    return result;
  }

  static void Attend(const double* q, const std::vector<Vector>& keys, int head,
                     const std::vector<bool>& visible, Vector& attended) {
    const int kv = head / (kHeads / kKvHeads);
    Vector weights(keys.size());
    double denominator = 0.0;
    for (std::size_t s = 0; s < keys.size(); ++s) {
      if (!visible.empty() && !visible[s]) continue;
      double score = 0.0;
      for (int d = 0; d < kDim; ++d)
        score += q[d] * keys[s][static_cast<std::size_t>(kv * kDim + d)];
      weights[s] = std::exp(score / std::sqrt(static_cast<double>(kDim)));
      denominator += weights[s];
    }
    for (std::size_t s = 0; s < keys.size(); ++s) {
      for (int d = 0; d < kValueDim; ++d) {
        attended[static_cast<std::size_t>(head * kValueDim + d)] +=
            weights[s] / denominator *
            keys[s][static_cast<std::size_t>(kKvHeads * kDim + kv * kValueDim + d)];
      }
    }
  }
};

// Rows of tokens one behind the other, in both forms that requests have.
struct Rows {
  std::vector<std::int64_t> lengths;
  std::vector<Vector> rows;
  std::vector<float> padded, packed;  // padding is NaN
  std::int64_t longest = 0;
  int size;

  Rows(std::vector<std::int64_t> given, int hidden_size, unsigned seed)
      : lengths(std::move(given)), size(hidden_size) {
    for (std::int64_t length : lengths) longest = std::max(longest, length);
    for (std::int64_t length : lengths) {
      rows.push_back(Random(static_cast<int>(length) * size, ++seed));
      const std::vector<float> values = ToFloat(rows.back());
      padded.insert(padded.end(), values.begin(), values.end());
      padded.insert(padded.end(), static_cast<std::size_t>((longest - length) * size),
                    std::nanf(""));
      packed.insert(packed.end(), values.begin(), values.end());
    }
  }
  std::int64_t batch() const { return static_cast<std::int64_t>(lengths.size()); }
  TensorView Padded() const {
    return TensorView(padded.data(), DType::kFloat32, {batch(), longest, size});
  }
  TensorView Packed() const {
    return TensorView(packed.data(), DType::kFloat32,
                      {static_cast<std::int64_t>(packed.size()) / size, size});
  }
};

class CrossAttentionTest : public testing::TestWithParam<std::string> {
 protected:
  struct Result {
    absl::Status status;
    std::vector<float> output, weights, present_key, present_value;
    std::size_t peak = 0;
    std::uint64_t flops = 0;
  };
  Result Run(const HostedLayer& layer, const ForwardInputs& inputs) {
    const ProjectedAttention module(
        layer, FindImplementation(BuiltInImplementations(), GetParam())->create(), kMaxTokens);
    Result result;
    const auto plan = module.Plan(inputs);
    result.status = plan.status();
    if (!plan.ok()) return result;
    const auto bind = [](const OutputSpec& spec, std::vector<float>& values) {
      if (!spec.defined()) return MutableTensorView();
      values.assign(spec.bytes() / sizeof(float), std::nanf(""));
      return MutableTensorView(values.data(), spec.dtype, spec.shape.data(),
                               static_cast<int>(spec.shape.size()));
    };
    const AttentionProblem::Outputs& specs = plan->outputs;
    const ForwardOutputs outputs = {bind(specs.output, result.output),
                                    bind(specs.attention_weights, result.weights),
                                    bind(specs.present_key, result.present_key),
                                    bind(specs.present_value, result.present_value)};
    test_.Execute([&](ExecutionContext& context) {
      result.status = module.Forward(inputs, outputs, context);
      result.peak = context.workspace.meter().peak();
      result.flops = context.flops;
    });
    // Normalisation's temporaries are LibTorch's, of any layer, and not foreseen.
    if (layer.weights->query_norm.defined()) return result;
    EXPECT_LE(result.peak, module.MemoryUsage(plan->shape, 2).bytes);
    return result;
  }

  static void ExpectClose(const float* actual, const Vector& expected) {
    for (std::size_t i = 0; i < expected.size(); ++i)
      ASSERT_NEAR(actual[i], expected[i], 2e-5) << i;
  }

  TestDevice test_;
};

TEST_P(CrossAttentionTest, QueriesSeeAllKeysOfTheEncoder) {
  for (const bool norms : {false, true}) {
    CrossLayer layer;
    layer.norms = norms;
    const Rows hidden({3, 3}, kHidden, 10), encoder({9, 9}, kEncoder, 20);
    ForwardInputs inputs;
    inputs.hidden_states = hidden.Padded();
    inputs.encoder_hidden_states = encoder.Padded();
    const Result result = Run(layer.Hosted(), inputs);
    ASSERT_TRUE(result.status.ok()) << result.status;
    for (std::size_t b = 0; b < 2; ++b) {
      ExpectClose(result.output.data() + b * 3 * kHidden,
                  layer.Forward(hidden.rows[b], encoder.rows[b]));
    }
    EXPECT_GE(result.flops,
              2u * 6 * kHidden * (kQueries + kAttended) + 2u * 18 * kEncoder * kKeyValues);
  }
}

TEST_P(CrossAttentionTest, LengthsInEveryLayout) {
  const CrossLayer layer;
  const Rows hidden({2, 4, 1}, kHidden, 30), encoder({7, 1, 12}, kEncoder, 40);
  for (const bool hidden_packed : {false, true}) {
    for (const bool encoder_packed : {false, true}) {
      ForwardInputs inputs;
      inputs.hidden_states = hidden_packed ? hidden.Packed() : hidden.Padded();
      inputs.encoder_hidden_states = encoder_packed ? encoder.Packed() : encoder.Padded();
      inputs.query_lengths = hidden.lengths;
      inputs.kv_lengths = encoder.lengths;
      const Result result = Run(layer.Hosted(), inputs);
      ASSERT_TRUE(result.status.ok()) << result.status;
      const float* output = result.output.data();
      for (std::size_t b = 0; b < 3; ++b) {
        ExpectClose(output, layer.Forward(hidden.rows[b], encoder.rows[b]));
        output += (hidden_packed ? hidden.lengths[b] : hidden.longest) * kHidden;
        if (hidden_packed) continue;
        const float* const end = output;
        for (const float* at = end - (hidden.longest - hidden.lengths[b]) * kHidden; at < end; ++at)
          ASSERT_EQ(*at, 0.0f);
      }
    }
  }
}

TEST_P(CrossAttentionTest, MasksAreOfTheEncodersKeys) {
  const CrossLayer layer;
  const Rows hidden({2}, kHidden, 50), encoder({5}, kEncoder, 60);
  const std::vector<bool> visible = {true, false, true, true, false};
  const std::int64_t padding[] = {1, 0, 1, 1, 0};
  constexpr float kHides = -std::numeric_limits<float>::infinity();
  const float additive[] = {0, kHides, 0, 0, kHides, 0, kHides, 0, 0, kHides};
  const Vector expected = layer.Forward(hidden.rows[0], encoder.rows[0], visible);
  ForwardInputs inputs;
  inputs.hidden_states = hidden.Padded();
  inputs.encoder_hidden_states = encoder.Padded();
  for (const TensorView& mask : {TensorView(padding, DType::kInt64, {1, 5}),
                                 TensorView(additive, DType::kFloat32, {2, 5})}) {
    inputs.attention_mask = mask;
    const Result result = Run(layer.Hosted(), inputs);
    ASSERT_TRUE(result.status.ok()) << result.status;
    ExpectClose(result.output.data(), expected);
  }
}

TEST_P(CrossAttentionTest, WeightsAreOverTheEncodersKeys) {
  if (GetParam() != "standard") GTEST_SKIP() << GetParam() << " does not form weights";
  const CrossLayer layer;
  const Rows hidden({2, 1}, kHidden, 51), encoder({5, 3}, kEncoder, 61);
  ForwardInputs inputs;
  inputs.hidden_states = hidden.Padded();
  inputs.encoder_hidden_states = encoder.Padded();
  inputs.query_lengths = hidden.lengths;
  inputs.kv_lengths = encoder.lengths;
  inputs.output_attentions = true;
  const Result result = Run(layer.Hosted(), inputs);
  ASSERT_TRUE(result.status.ok()) << result.status;
  ASSERT_EQ(result.weights.size(), std::size_t{2 * kHeads * 2 * 5});
  for (int b = 0; b < 2; ++b) {
    for (int row = 0; row < kHeads * 2; ++row) {
      const float* const weights = result.weights.data() + (b * kHeads * 2 + row) * 5;
      const bool is_padding = row % 2 >= hidden.lengths[static_cast<std::size_t>(b)];
      float sum = 0.0f;
      for (int k = 0; k < 5; ++k) {
        if (k >= encoder.lengths[static_cast<std::size_t>(b)]) {
          EXPECT_EQ(weights[k], 0.0f);
        }
        sum += weights[k];
      }
      EXPECT_NEAR(sum, is_padding ? 0.0f : 1.0f, 1e-5f);
    }
  }
}

TEST_P(CrossAttentionTest, PresentServesAsThePastOfALaterCall) {
  const CrossLayer layer;
  const HostedLayer hosted = layer.Hosted();
  const Rows hidden({2}, kHidden, 70), encoder({6}, kEncoder, 80);
  ForwardInputs inputs;
  inputs.hidden_states = hidden.Padded();
  inputs.encoder_hidden_states = encoder.Padded();
  inputs.use_cache = true;
  const Result first = Run(hosted, inputs);
  ASSERT_TRUE(first.status.ok()) << first.status;
  ASSERT_EQ(first.present_key.size(), std::size_t{kKvHeads * 6 * kDim});

  const Rows later({3}, kHidden, 90);
  inputs.hidden_states = later.Padded();
  inputs.encoder_hidden_states = TensorView(nullptr, DType::kFloat32, {1, 0, kEncoder});
  inputs.use_cache = false;
  inputs.past_key = TensorView(first.present_key.data(), DType::kFloat32, {1, kKvHeads, 6, kDim});
  inputs.past_value =
      TensorView(first.present_value.data(), DType::kFloat32, {1, kKvHeads, 6, kValueDim});
  const Result second = Run(hosted, inputs);
  ASSERT_TRUE(second.status.ok()) << second.status;
  ExpectClose(second.output.data(), layer.Forward(later.rows[0], encoder.rows[0]));
}

TEST_P(CrossAttentionTest, AnEncoderWithoutTokensGivesTheBias) {
  const CrossLayer layer;
  const Rows hidden({2, 2}, kHidden, 71), encoder({0, 3}, kEncoder, 81);
  ForwardInputs inputs;
  inputs.hidden_states = hidden.Padded();
  inputs.encoder_hidden_states = encoder.Padded();
  inputs.kv_lengths = encoder.lengths;
  const Result result = Run(layer.Hosted(), inputs);
  ASSERT_TRUE(result.status.ok()) << result.status;
  ExpectClose(result.output.data(), layer.output_bias);
  ExpectClose(result.output.data() + kHidden, layer.output_bias);
  ExpectClose(result.output.data() + 2 * kHidden, layer.Forward(hidden.rows[1], encoder.rows[1]));
}

INSTANTIATE_TEST_SUITE_P(Implementations, CrossAttentionTest,
                         testing::Values("standard", "flash", "torch_sdpa"),
                         [](const auto& test) { return test.param; });

// What is wrong, by the field that the status names.
class CrossAttentionErrorsTest : public testing::Test {
 protected:
  CrossAttentionErrorsTest() {
    inputs_.hidden_states = TensorView(values_.data(), DType::kFloat32, {2, 3, kHidden});
    inputs_.encoder_hidden_states = TensorView(values_.data(), DType::kFloat32, {2, 5, kEncoder});
  }
  absl::Status Plan() const {
    return ProjectedAttention(layer_, nullptr, kMaxTokens).Plan(inputs_).status();
  }
  void ExpectInvalid(const std::string& field) const {
    const absl::Status status = Plan();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_EQ(ErrorDetailsOf(status)["field"], field) << status;
  }
  void SetEncoder(DType dtype, std::initializer_list<std::int64_t> shape) {
    inputs_.encoder_hidden_states = TensorView(values_.data(), dtype, shape);
  }

  std::vector<float> values_ = std::vector<float>(5000 * kHidden);
  HostedLayer layer_ = CrossLayer().Hosted();
  ForwardInputs inputs_;
};

TEST_F(CrossAttentionErrorsTest, TheEncodersTensor) {
  ASSERT_TRUE(Plan().ok()) << Plan();
  inputs_.encoder_hidden_states = TensorView();
  ExpectInvalid("encoder_hidden_states");
  SetEncoder(DType::kInt64, {2, 5, kEncoder});
  ExpectInvalid("encoder_hidden_states");
  SetEncoder(DType::kFloat32, {2, 5, kHidden});
  ExpectInvalid("encoder_hidden_states");
  SetEncoder(DType::kFloat32, {1, 2, 5, kEncoder});
  ExpectInvalid("encoder_hidden_states");
  SetEncoder(DType::kFloat32, {3, 5, kEncoder});
  ExpectInvalid("encoder_hidden_states");
  SetEncoder(DType::kFloat32, {1, 5, kEncoder});
  ExpectInvalid("encoder_hidden_states");
  SetEncoder(DType::kFloat32, {2, kMaxTokens / 2 + 1, kEncoder});
  ExpectInvalid("encoder_hidden_states");
}

TEST_F(CrossAttentionErrorsTest, Lengths) {
  for (const std::vector<std::int64_t>& lengths :
       {std::vector<std::int64_t>{5}, {5, 5, 5}, {5, 6}, {5, -1}}) {
    inputs_.kv_lengths = lengths;
    ExpectInvalid("kv_lengths");
  }
  SetEncoder(DType::kFloat32, {9, kEncoder});
  for (const std::vector<std::int64_t>& lengths :
       {std::vector<std::int64_t>{}, {9}, {5, 5}, {5, 3}, {10, -1}, {3, 3, 3}}) {
    inputs_.kv_lengths = lengths;
    ExpectInvalid("kv_lengths");
  }
  inputs_.kv_lengths = {5, 4};
  EXPECT_TRUE(Plan().ok()) << Plan();
  inputs_.hidden_states = TensorView(values_.data(), DType::kFloat32, {6, kHidden});
  ExpectInvalid("query_lengths");
  inputs_.query_lengths = {4, 1};
  ExpectInvalid("query_lengths");
  inputs_.query_lengths = {2, 2, 2};
  ExpectInvalid("kv_lengths");
  inputs_.query_lengths = {4, 2};
  EXPECT_TRUE(Plan().ok()) << Plan();
}

TEST_F(CrossAttentionErrorsTest, MasksAndPositions) {
  inputs_.attention_mask = TensorView(values_.data(), DType::kFloat32, {2, kHeads, 3, 6});
  ExpectInvalid("attention_mask");
  inputs_.attention_mask = TensorView(values_.data(), DType::kFloat32, {2, kHeads, 3, 5});
  EXPECT_TRUE(Plan().ok()) << Plan();
  // Queries beyond the stack's positions have no place that could be wrong, unless it is given.
  inputs_.hidden_states = TensorView(values_.data(), DType::kFloat32, {2, 3, kHidden});
  const std::int64_t positions[] = {0, 1, 4};
  inputs_.position_ids = TensorView(positions, DType::kInt64, {1, 3});
  EXPECT_EQ(Plan().code(), absl::StatusCode::kOutOfRange);
  inputs_ = {};
  inputs_.hidden_states = TensorView(values_.data(), DType::kFloat32, {2, 9, kHidden});
  SetEncoder(DType::kFloat32, {2, 5, kEncoder});
  EXPECT_TRUE(Plan().ok()) << Plan();
}

TEST_F(CrossAttentionErrorsTest, SelfAttentionHasNoEncoder) {
  layer_.kind = AttentionKind::kSelf;
  ExpectInvalid("encoder_hidden_states");
  inputs_.encoder_hidden_states = TensorView();
  inputs_.kv_lengths = {3, 3};
  ExpectInvalid("kv_lengths");
}

}  // namespace
}  // namespace attn
