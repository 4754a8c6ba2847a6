// What a caller says beside a directory (dtype, architecture), conversion of weights, and slices.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "core/dtype_conversion.h"
#include "core/error.h"
#include "core/model_directory.h"
#include "tests/core/tiny_models.h"

namespace attn {
namespace {

using namespace attn::testing;  // NOLINT: fixtures of this folder

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Rounding {
  float value;
  std::uint16_t bits;
};

template <typename To>
To Converted(DType from, const void* source, DType to) {
  To result;
  ConvertElements(source, from, &result, to, 1);
  return result;
}

TEST(ConvertElements, RoundsToNearestEvenFloat16) {
  for (const Rounding& c : {Rounding{0.0f, 0x0000},
                            {-0.0f, 0x8000},
                            {1.0f, 0x3c00},
                            {-2.0f, 0xc000},
                            {1.0f + 0x1p-11f, 0x3c00},      // half way: to even, down
                            {1.0f + 3 * 0x1p-11f, 0x3c02},  // half way: to even, up
                            {1.0f + 0x1p-11f + 0x1p-20f, 0x3c01},
                            {2.0f - 0x1p-12f, 0x4000},  // the carry reaches the exponent
                            {65504.0f, 0x7bff},
                            {65519.996f, 0x7bff},
                            {65520.0f, 0x7c00},
                            {-1e30f, 0xfc00},
                            {kInfinity, 0x7c00},
                            {0x1p-14f, 0x0400},
                            {0x1p-14f - 0x1p-26f, 0x0400},  // a subnormal that rounds to a normal
                            {0x1p-24f, 0x0001},
                            {0x1p-25f, 0x0000},
                            {0x1.8p-24f, 0x0002},
                            {-0x1.000002p-25f, 0x8001},
                            {1e-40f, 0x0000}}) {
    EXPECT_EQ(Converted<std::uint16_t>(DType::kFloat32, &c.value, DType::kFloat16), c.bits)
        << c.value;
  }
}

TEST(ConvertElements, RoundsToNearestEvenBFloat16) {
  for (const Rounding& c : {Rounding{1.0f, 0x3f80},
                            {1.0f + 0x1p-8f, 0x3f80},
                            {1.0f + 3 * 0x1p-8f, 0x3f82},
                            {1.0f + 0x1p-8f + 0x1p-23f, 0x3f81},
                            {-0.0f, 0x8000},
                            {std::numeric_limits<float>::max(), 0x7f80},
                            {-kInfinity, 0xff80},
                            {0x1p-133f, 0x0001},
                            {0x1p-134f, 0x0000}}) {
    EXPECT_EQ(Converted<std::uint16_t>(DType::kFloat32, &c.value, DType::kBFloat16), c.bits)
        << c.value;
  }
}

TEST(ConvertElements, KeepsNan) {
  for (std::uint32_t bits : {0x7f800001u, 0x7fffffffu, 0xffffffffu, 0x7fc00000u}) {
    for (DType to : {DType::kFloat16, DType::kBFloat16}) {
      const auto narrow = Converted<std::uint16_t>(DType::kFloat32, &bits, to);
      EXPECT_TRUE(std::isnan(Converted<float>(to, &narrow, DType::kFloat32))) << bits;
    }
  }
}

// Every 16-bit value survives the way to float32 and back; NaNs stay NaN.
TEST(ConvertElements, WidensExactly) {
  for (DType half : {DType::kFloat16, DType::kBFloat16}) {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
      const auto narrow = static_cast<std::uint16_t>(bits);
      const auto wide = Converted<float>(half, &narrow, DType::kFloat32);
      if (std::isnan(wide)) continue;
      EXPECT_EQ(Converted<std::uint16_t>(DType::kFloat32, &wide, half), narrow);
    }
  }
  const std::uint16_t smallest = 0x0001, largest = 0x7bff, negative = 0xc500;
  EXPECT_EQ(Converted<float>(DType::kFloat16, &smallest, DType::kFloat32), 0x1p-24f);
  EXPECT_EQ(Converted<float>(DType::kFloat16, &largest, DType::kFloat32), 65504.0f);
  EXPECT_EQ(Converted<float>(DType::kFloat16, &negative, DType::kFloat32), -5.0f);
}

TEST(ConvertElements, ConvertsBetweenTheNarrowOnes) {
  const std::uint16_t bf16[] = {0x3f80, 0x4700, 0x4780, 0x7f80};  // 1, 32768, 65536, inf
  std::uint16_t f16[4];
  ConvertElements(bf16, DType::kBFloat16, f16, DType::kFloat16, 4);
  EXPECT_EQ(f16[0], 0x3c00);
  EXPECT_EQ(f16[1], 0x7800);
  EXPECT_EQ(f16[2], 0x7c00);
  EXPECT_EQ(f16[3], 0x7c00);
  const std::uint16_t fine = 0x3c01;  // 1 + 2^-10 has no place in bfloat16
  EXPECT_EQ(Converted<std::uint16_t>(DType::kFloat16, &fine, DType::kBFloat16), 0x3f80);
}

class ModelWeightsTest : public ::testing::Test {
 protected:
  ModelWeightsTest() { spec_.weights = directory_.path(); }

  absl::StatusOr<LoadedModel> Load() { return LoadModelDirectory(spec_, options_); }

  void ExpectDisagreement(const std::string& field) {
    const auto loaded = Load();
    ASSERT_FALSE(loaded.ok()) << field;
    EXPECT_EQ(loaded.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(ErrorReason(loaded.status()), "INVALID_FIELD");
    EXPECT_EQ(ErrorDetailsOf(loaded.status())["field"], field) << loaded.status();
  }

  TemporaryDirectory directory_;
  ModelSpec spec_;
  LoadOptions options_;
};

TEST_F(ModelWeightsTest, ConvertsToTheDTypeThatIsAskedFor) {
  WriteModel(directory_.path(), TinyBertConfig(), TinyTensors(BertNames()));
  spec_.dtype = DType::kBFloat16;
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->spec.dtype, DType::kBFloat16);
  const Parameter& weight = loaded->stacks[0].self_attention[0].query_key_value.weight;
  ASSERT_EQ(weight.bytes(), 96u);
  std::uint16_t elements[48];
  std::memcpy(elements, weight.data.get(), sizeof(elements));
  EXPECT_EQ(elements[8], 0x3f80);   // query: 0 + 8 / 8
  EXPECT_EQ(elements[32], 0x41a0);  // value: 20
  for (DType dtype : {DType::kInt8, DType::kInt64, DType::kBool}) {
    spec_.dtype = dtype;
    ExpectDisagreement("dtype");
  }
}

TEST_F(ModelWeightsTest, KeepsTheDTypeOfTheCheckpoint) {
  std::vector<TestTensor> tensors = TinyTensors(BertNames());
  for (TestTensor& tensor : tensors) {
    const std::size_t count = tensor.bytes.size() / sizeof(float);
    tensor =
        HalfTensor(tensor.name, "F16", tensor.shape, std::vector<std::uint16_t>(count, 0x3c00));
  }
  WriteModel(directory_.path(), TinyBertConfig(), tensors);
  auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->spec.dtype, DType::kFloat16);
  EXPECT_EQ(loaded->stacks[0].self_attention[0].output.weight.bytes(), 32u);

  // Where tensors differ, the dtype that holds all of them.
  tensors.back() = HalfTensor(tensors.back().name, "BF16", {4}, {0x3f80, 0, 0, 0});
  WriteModel(directory_.path(), TinyBertConfig(), tensors);
  loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->spec.dtype, DType::kFloat32);
  float first = 0.0f;
  std::memcpy(&first, loaded->stacks[0].self_attention[1].output.bias.data.get(), sizeof(first));
  EXPECT_EQ(first, 1.0f);
}

TEST_F(ModelWeightsTest, ConvertsInSlices) {
  // 520 x 520 float32 weights are a little over 1 MiB each.
  nlohmann::json config = TinyBertConfig();
  config.update({{"hidden_size", 520}, {"num_hidden_layers", 1}});
  std::vector<TestTensor> tensors = TinyTensors(BertNames(), 1);
  for (TestTensor& tensor : tensors) {
    for (std::int64_t& extent : tensor.shape) extent = 520;
    tensor = FloatTensor(tensor.name, tensor.shape);
  }
  WriteModel(directory_.path(), config, tensors);
  int slices = 0;
  options_.run_slice = [&](const std::function<void()>& slice) {
    ++slices;
    slice();
    return absl::OkStatus();
  };
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(slices, 4 * 2 + 4);
  const Parameter& weight = loaded->stacks[0].self_attention[0].query_key_value.weight;
  std::vector<float> values(static_cast<std::size_t>(weight.num_elements()));
  std::memcpy(values.data(), weight.data.get(), weight.bytes());
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(values[i], static_cast<float>(i % (520 * 520)) / 8.0f) << i;
  }

  spec_.dtype = DType::kBFloat16;
  const auto narrow = Load();
  ASSERT_TRUE(narrow.ok()) << narrow.status();
  std::vector<std::uint16_t> elements(values.size());
  ConvertElements(values.data(), DType::kFloat32, elements.data(), DType::kBFloat16, values.size());
  EXPECT_EQ(std::memcmp(narrow->stacks[0].self_attention[0].query_key_value.weight.data.get(),
                        elements.data(), elements.size() * sizeof(std::uint16_t)),
            0);

  spec_.dtype = DType::kUnspecified;
  slices = 12;
  options_.run_slice = [&](const std::function<void()>&) {
    return --slices > 5 ? absl::OkStatus() : absl::CancelledError("draining");
  };
  EXPECT_EQ(Load().status().code(), absl::StatusCode::kCancelled);
}

TEST_F(ModelWeightsTest, ACallerMayRepeatWhatTheDirectorySays) {
  WriteModel(directory_.path(), TinyBertConfig(), TinyTensors(BertNames()));
  LayerSpec layer;
  layer.repeat = 0;  // counts as 1
  layer.num_heads = 2;
  layer.head_dim = 2;
  layer.options.scale = 0.7071068;
  layer.options.is_causal = false;
  layer.options.window_left = -1;
  layer.options.soft_cap = 0.0;
  layer.options.sink_logits.emplace();
  LayerStack stack;
  stack.hidden_size = 4;
  stack.self_attention = {layer, layer};
  spec_.stacks = {stack};
  spec_.modality = Modality::kLanguage;
  const auto loaded = Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->spec.stacks[0].self_attention.size(), 1u);
}

TEST_F(ModelWeightsTest, RefusesASpecThatDisagrees) {
  WriteModel(directory_.path(), TinyBertConfig(), TinyTensors(BertNames()));
  spec_.modality = Modality::kVision;
  ExpectDisagreement("modality");
  spec_.modality = Modality::kUnspecified;

  LayerStack good;
  good.self_attention = {LayerSpec{}, LayerSpec{}};
  spec_.stacks = {good, good};
  ExpectDisagreement("stacks");

  const auto with = [&](const std::string& field, const std::function<void(LayerStack&)>& change) {
    spec_.stacks = {good};
    change(spec_.stacks[0]);
    ExpectDisagreement("stacks[0]." + field);
  };
  with("name", [](LayerStack& s) { s.name = "decoder"; });
  with("modality", [](LayerStack& s) { s.modality = Modality::kVision; });
  with("hidden_size", [](LayerStack& s) { s.hidden_size = 8; });
  with("max_positions", [](LayerStack& s) { s.max_positions = 512; });
  with("self_attention", [](LayerStack& s) { s.self_attention[1].repeat = 4'294'967'295u; });
  with("self_attention", [](LayerStack& s) { s.self_attention.pop_back(); });
  with("cross_attention", [](LayerStack& s) { s.cross_attention = {LayerSpec{}}; });
  const std::string second = "self_attention[1].";
  with(second + "num_heads", [](LayerStack& s) { s.self_attention[1].num_heads = 4; });
  with(second + "num_kv_heads", [](LayerStack& s) { s.self_attention[1].num_kv_heads = 1; });
  with(second + "head_dim", [](LayerStack& s) { s.self_attention[1].head_dim = 1; });
  with(second + "value_dim", [](LayerStack& s) { s.self_attention[1].value_dim = 1; });
  with(second + "encoder_hidden_size",
       [](LayerStack& s) { s.self_attention[1].encoder_hidden_size = 4; });
  with(second + "rotary", [](LayerStack& s) { s.self_attention[1].rotary.emplace(); });
  const auto with_option = [&](const std::string& field,
                               const std::function<void(AttentionOptions&)>& change) {
    with(second + "options." + field, [&](LayerStack& s) { change(s.self_attention[1].options); });
  };
  with_option("scale", [](AttentionOptions& o) { o.scale = 0.5; });
  with_option("scale", [](AttentionOptions& o) { o.scale = std::nan(""); });
  with_option("is_causal", [](AttentionOptions& o) { o.is_causal = true; });
  with_option("window_left", [](AttentionOptions& o) { o.window_left = 8; });
  with_option("window_right", [](AttentionOptions& o) { o.window_right = 0; });
  with_option("soft_cap", [](AttentionOptions& o) { o.soft_cap = 50.0; });
  with_option("alibi_slopes", [](AttentionOptions& o) { o.alibi_slopes = {{0.5f, 0.25f}}; });
  with_option("sink_logits", [](AttentionOptions& o) { o.sink_logits = {{0.0f, 0.0f}}; });
}

TEST(Override, EachFieldThatTheRequestSetsWins) {
  AttentionOptions layer;
  layer.scale = 0.5;
  layer.is_causal = true;
  layer.window_left = 128;
  layer.sink_logits = {{1.0f}};
  AttentionOptions request;
  request.is_causal = false;
  request.window_left = -1;  // "off" is a value
  request.soft_cap = 30.0;
  request.sink_logits.emplace();
  const AttentionOptions merged = Override(layer, request);
  EXPECT_EQ(merged.scale, 0.5);
  EXPECT_EQ(merged.is_causal, false);
  EXPECT_EQ(merged.window_left, -1);
  EXPECT_FALSE(merged.window_right.has_value());
  EXPECT_EQ(merged.soft_cap, 30.0);
  EXPECT_FALSE(merged.alibi_slopes.has_value());
  ASSERT_TRUE(merged.sink_logits.has_value());
  EXPECT_TRUE(merged.sink_logits->empty());
}

}  // namespace
}  // namespace attn
