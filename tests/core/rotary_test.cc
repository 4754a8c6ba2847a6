// Rotary embedding against its formulas in double precision; transformers' own numbers are held
// against it in tests/end_to_end/test_rotary.py.
#include "core/rotary.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "core/dtype_conversion.h"
#include "core/error.h"

namespace attn {
namespace {

RotaryEmbedding Plain() {
  RotaryEmbedding embedding;
  embedding.theta = 10000.0;
  return embedding;
}

RotaryEmbedding LongRope() {
  RotaryEmbedding embedding = Plain();
  embedding.scaling = "longrope";
  embedding.scaling_parameters = {{"factor", 4.0}, {"original_max_position_embeddings", 8.0}};
  embedding.short_factor = {1.0, 1.0, 1.0, 1.0};
  embedding.long_factor = {2.0, 3.0, 4.0, 5.0};
  return embedding;
}

RotaryEmbedding Dynamic() {
  RotaryEmbedding embedding = Plain();
  embedding.scaling = "dynamic";
  embedding.scaling_parameters = {{"factor", 2.0}, {"max_position_embeddings", 8.0}};
  return embedding;
}

RotaryEmbedding Yarn() {
  RotaryEmbedding embedding = Plain();
  embedding.scaling = "yarn";
  embedding.scaling_parameters = {{"factor", 4.0}, {"original_max_position_embeddings", 64.0}};
  return embedding;
}

RotaryEmbedding Llama3() {
  RotaryEmbedding embedding = Plain();
  embedding.scaling = "llama3";
  embedding.scaling_parameters = {{"factor", 8.0},
                                  {"low_freq_factor", 1.0},
                                  {"high_freq_factor", 4.0},
                                  {"original_max_position_embeddings", 64.0}};
  return embedding;
}

std::shared_ptr<const Rotary> Make(const RotaryEmbedding& embedding, std::int64_t head_dim = 8,
                                   std::int64_t positions = 0) {
  auto made = Rotary::Create("layer.rotary", embedding, head_dim, positions);
  EXPECT_TRUE(made.ok()) << made.status();
  return made.ok() ? *made : nullptr;
}

struct AngleTable {
  std::vector<float> cos;
  std::vector<float> sin;
};

AngleTable AnglesOf(const Rotary& rotary, const std::vector<std::int64_t>& positions,
                    std::int64_t axis_stride, std::int64_t count, std::int64_t largest) {
  AngleTable table;
  const auto size = static_cast<std::size_t>(count * rotary.pairs());
  table.cos.assign(size, std::nanf(""));
  table.sin.assign(size, std::nanf(""));
  rotary.Angles(positions.data(), axis_stride, count, largest, table.cos.data(), table.sin.data());
  return table;
}

AngleTable AnglesOf(const Rotary& rotary, const std::vector<std::int64_t>& positions,
                    std::int64_t largest) {
  return AnglesOf(rotary, positions, 0, static_cast<std::int64_t>(positions.size()), largest);
}

void ExpectAngle(const AngleTable& table, std::size_t place, double angle, double scale = 1.0) {
  EXPECT_NEAR(table.cos[place], scale * std::cos(angle), 1e-5) << place;
  EXPECT_NEAR(table.sin[place], scale * std::sin(angle), 1e-5) << place;
}

void ExpectInvalid(const RotaryEmbedding& embedding, const std::string& field,
                   std::int64_t head_dim = 8) {
  const auto made = Rotary::Create("layer.rotary", embedding, head_dim, 0);
  ASSERT_FALSE(made.ok()) << field;
  EXPECT_EQ(made.status().code(), absl::StatusCode::kInvalidArgument) << made.status();
  EXPECT_EQ(ErrorDetailsOf(made.status())["field"], "layer.rotary." + field) << made.status();
}

TEST(Rotary, AnglesArePositionTimesFrequency) {
  const auto rotary = Make(Plain());
  EXPECT_EQ(rotary->axes(), 1);
  EXPECT_EQ(rotary->pairs(), 4);
  EXPECT_FALSE(rotary->needs_positions());
  const std::vector<std::int64_t> positions = {0, 1, 7, 1000};
  const AngleTable table = AnglesOf(*rotary, positions, 1000);
  for (std::size_t token = 0; token < positions.size(); ++token) {
    for (std::size_t pair = 0; pair < 4; ++pair) {
      const double frequency = std::pow(10000.0, -2.0 * static_cast<double>(pair) / 8.0);
      // The angle is a float32 product: at 1,000 it is known to 6e-5.
      const double tolerance = 1e-6 + 1e-7 * static_cast<double>(positions[token]);
      const double angle = static_cast<double>(positions[token]) * frequency;
      EXPECT_NEAR(table.cos[token * 4 + pair], std::cos(angle), tolerance);
      EXPECT_NEAR(table.sin[token * 4 + pair], std::sin(angle), tolerance);
    }
  }
}

TEST(Rotary, RotatesHalvesOrNeighbours) {
  const float cos[] = {0.0f, 0.5f};
  const float sin[] = {1.0f, 0.25f};
  std::vector<float> vector = {1, 2, 3, 4, 5, 6};
  RotaryEmbedding embedding = Plain();
  embedding.rotary_dim = 4;
  Make(embedding, 6)->Rotate(vector.data(), DType::kFloat32, cos, sin);
  EXPECT_EQ(vector, (std::vector<float>{-3, 0, 1, 2.5, 5, 6}));
  vector = {1, 2, 3, 4, 5, 6};
  embedding.interleaved = true;
  Make(embedding, 6)->Rotate(vector.data(), DType::kFloat32, cos, sin);
  EXPECT_EQ(vector, (std::vector<float>{-2, 1, 0.5, 2.75, 5, 6}));
}

// Sizes around the block in which narrow dtypes are widened; float32 says what is right.
TEST(Rotary, NarrowDTypesAreRotatedInFloat32) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const bool interleaved : {false, true}) {
      for (const std::size_t dim : {2u, 6u, 128u, 130u, 256u, 300u}) {
        RotaryEmbedding embedding = Plain();
        embedding.interleaved = interleaved;
        embedding.rotary_dim = static_cast<std::uint32_t>(dim);
        const auto partial = Make(embedding, static_cast<std::int64_t>(dim + 3));
        const AngleTable table = AnglesOf(*partial, {5}, 5);
        std::vector<std::uint16_t> narrow(dim + 3);
        std::vector<float> wide(dim + 3);
        for (std::size_t i = 0; i < wide.size(); ++i) {
          wide[i] = static_cast<float>(i % 17) - 8.0f;
        }
        ConvertElements(wide.data(), DType::kFloat32, narrow.data(), dtype, wide.size());
        partial->Rotate(wide.data(), DType::kFloat32, table.cos.data(), table.sin.data());
        partial->Rotate(narrow.data(), dtype, table.cos.data(), table.sin.data());
        std::vector<std::uint16_t> expected(wide.size());
        ConvertElements(wide.data(), DType::kFloat32, expected.data(), dtype, wide.size());
        EXPECT_EQ(narrow, expected) << dim << interleaved;
      }
    }
  }
}

TEST(Rotary, LongRopeFollowsTheRowsOwnLargestPosition) {
  const auto rotary = Make(LongRope());
  const double scale = std::sqrt(1.0 + std::log(4.0) / std::log(8.0));
  for (const std::int64_t largest : {3, 7, 8, 100}) {
    const AngleTable table = AnglesOf(*rotary, {3}, largest);
    for (std::size_t pair = 0; pair < 4; ++pair) {
      const double stretch = largest >= 8 ? 2.0 + static_cast<double>(pair) : 1.0;
      ExpectAngle(table, pair, 3.0 * std::pow(10000.0, -static_cast<double>(pair) / 4.0) / stretch,
                  scale);
    }
  }
}

TEST(Rotary, DynamicFollowsTheRowsOwnLargestPosition) {
  const auto rotary = Make(Dynamic());
  for (const std::int64_t largest : {3, 7, 8, 100}) {
    // Several tokens: the last one's sines must not disturb the others' frequencies.
    const AngleTable table = AnglesOf(*rotary, {3, 2, 1}, largest);
    const double length = std::max(static_cast<double>(largest + 1), 8.0);
    const double theta = 10000.0 * std::pow(2.0 * length / 8.0 - 1.0, 8.0 / 6.0);
    for (std::size_t place = 0; place < 12; ++place) {
      const std::size_t token = place / 4;
      const double position = 3.0 - static_cast<double>(token);
      ExpectAngle(table, place, position * std::pow(theta, -static_cast<double>(place % 4) / 4.0));
    }
  }
  // The limit may come from the model instead.
  RotaryEmbedding embedding = Dynamic();
  embedding.scaling_parameters.erase("max_position_embeddings");
  ExpectInvalid(embedding, "scaling_parameters.max_position_embeddings");
  const AngleTable given = AnglesOf(*Make(embedding, 8, 8), {3}, 100);
  const AngleTable named = AnglesOf(*rotary, {3}, 100);
  EXPECT_EQ(given.cos, named.cos);
}

TEST(Rotary, SectionsGiveFrequenciesToAxes) {
  RotaryEmbedding embedding = Plain();
  embedding.axis_sections = {1, 1, 2};
  auto rotary = Make(embedding);
  EXPECT_EQ(rotary->axes(), 3);
  EXPECT_FALSE(rotary->needs_positions());
  // Two tokens: time 5 and 6, height 7 and 8, width 9 and 10.
  AngleTable table = AnglesOf(*rotary, {5, 6, 7, 8, 9, 10}, 2, 2, 10);
  const double shared[] = {1.0, 0.1, 0.01, 0.001};
  const double places[] = {5, 7, 9, 9, 6, 8, 10, 10};
  for (std::size_t i = 0; i < 8; ++i) ExpectAngle(table, i, places[i] * shared[i % 4]);
  // One axis serves all.
  table = AnglesOf(*rotary, {5, 6}, 0, 2, 6);
  for (std::size_t i = 0; i < 8; ++i) ExpectAngle(table, i, (i < 4 ? 5.0 : 6.0) * shared[i % 4]);

  embedding.axis_sections = {2, 2};
  embedding.frequencies_per_axis = true;
  rotary = Make(embedding);
  EXPECT_TRUE(rotary->needs_positions());
  table = AnglesOf(*rotary, {5, 7}, 1, 1, 7);
  const double own[] = {5.0, 5.0 * 0.01, 7.0, 7.0 * 0.01};
  for (std::size_t i = 0; i < 4; ++i) ExpectAngle(table, i, own[i]);
}

TEST(Rotary, PositionZeroLeavesVectorsAlone) {
  for (const RotaryEmbedding& embedding : {Plain(), LongRope(), Dynamic(), Yarn(), Llama3()}) {
    const auto rotary = Make(embedding);
    for (const std::int64_t largest : {std::int64_t{0}, std::numeric_limits<std::int64_t>::max()}) {
      const AngleTable table = AnglesOf(*rotary, {0, largest}, largest);
      for (std::size_t i = 0; i < 4; ++i) {
        EXPECT_EQ(table.sin[i], 0.0f);
        EXPECT_EQ(table.cos[i], table.cos[0]);
        EXPECT_TRUE(std::isfinite(table.cos[4 + i]) && std::isfinite(table.sin[4 + i]));
      }
      EXPECT_GE(table.cos[0], 1.0f);
    }
  }
  Make(Plain())->Angles(nullptr, 0, 0, 0, nullptr, nullptr);
}

TEST(Rotary, YarnAndLlama3StretchLowFrequenciesAlone) {
  const AngleTable plain = AnglesOf(*Make(Plain(), 32), {1}, 1);
  const AngleTable yarn = AnglesOf(*Make(Yarn(), 32), {1}, 1);
  const AngleTable llama3 = AnglesOf(*Make(Llama3(), 32), {1}, 1);
  const double scale = 0.1 * std::log(4.0) + 1.0;
  ExpectAngle(yarn, 0, 1.0, scale);
  ExpectAngle(llama3, 0, 1.0);
  const double lowest = std::pow(10000.0, -30.0 / 32.0);
  EXPECT_NEAR(yarn.sin[15], scale * std::sin(lowest / 4.0), 1e-8);
  EXPECT_NEAR(llama3.sin[15], std::sin(lowest / 8.0), 1e-8);
  EXPECT_NEAR(plain.sin[15], std::sin(lowest), 1e-8);
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

void ExpectInvalidWith(RotaryEmbedding embedding, const std::string& field,
                       const std::function<void(RotaryEmbedding&)>& change) {
  change(embedding);
  ExpectInvalid(embedding, field);
}

TEST(Rotary, RefusesWhatMakesNoSense) {
  for (const double theta : {0.0, -1.0, kNan, kInfinity}) {
    ExpectInvalidWith(Plain(), "theta", [&](RotaryEmbedding& e) { e.theta = theta; });
  }
  ExpectInvalidWith(Yarn(), "theta", [](RotaryEmbedding& e) { e.theta = 1.0; });
  for (const std::uint32_t dim : {1u, 3u, 10u, 4'294'967'294u}) {
    ExpectInvalidWith(Plain(), "rotary_dim", [&](RotaryEmbedding& e) { e.rotary_dim = dim; });
  }
  ExpectInvalid(Plain(), "rotary_dim", 7);
  for (const std::vector<std::uint32_t>& sections :
       {std::vector<std::uint32_t>{1, 2}, {4, 0}, {4'294'967'295u, 5}, {2, 2, 2}}) {
    ExpectInvalidWith(Plain(), "axis_sections",
                      [&](RotaryEmbedding& e) { e.axis_sections = sections; });
  }
  ExpectInvalidWith(Plain(), "short_factor", [](RotaryEmbedding& e) { e.short_factor = {1.0}; });
  ExpectInvalidWith(LongRope(), "short_factor",
                    [](RotaryEmbedding& e) { e.short_factor.pop_back(); });
  ExpectInvalidWith(LongRope(), "long_factor",
                    [](RotaryEmbedding& e) { e.long_factor.push_back(1.0); });
  for (const double factor : {0.0, -1.0, kNan, kInfinity}) {
    ExpectInvalidWith(LongRope(), "long_factor",
                      [&](RotaryEmbedding& e) { e.long_factor[2] = factor; });
  }
}

TEST(Rotary, RefusesScalingParametersThatMakeNoSense) {
  ExpectInvalidWith(Plain(), "scaling_parameters.factor",
                    [](RotaryEmbedding& e) { e.scaling_parameters["factor"] = 2.0; });
  const auto with_parameter = [](const RotaryEmbedding& embedding, const std::string& name,
                                 double value) {
    ExpectInvalidWith(embedding, "scaling_parameters." + name,
                      [&](RotaryEmbedding& e) { e.scaling_parameters[name] = value; });
  };
  for (const double value : {0.0, -1.0, kNan, kInfinity}) {
    for (const RotaryEmbedding& embedding : {LongRope(), Dynamic(), Yarn(), Llama3()}) {
      with_parameter(embedding, "factor", value);
    }
    with_parameter(Yarn(), "original_max_position_embeddings", value);
    with_parameter(Dynamic(), "max_position_embeddings", value);
  }
  with_parameter(Yarn(), "original_max_position_embeddings", 64.5);
  with_parameter(Yarn(), "truncate", 0.5);
  with_parameter(Yarn(), "beta_fast", 0.5);
  with_parameter(Yarn(), "attention_factor", -1.0);
  with_parameter(Llama3(), "high_freq_factor", 1.0);
  with_parameter(Yarn(), "low_freq_factor", 1.0);
  with_parameter(Dynamic(), "factor", 0.5);
  with_parameter(LongRope(), "original_max_position_embeddings", 1.0);
  ExpectInvalidWith(Yarn(), "scaling_parameters.factor",
                    [](RotaryEmbedding& e) { e.scaling_parameters.erase("factor"); });
}

TEST(Rotary, NamesAnUnknownScaling) {
  RotaryEmbedding embedding = Plain();
  embedding.scaling = "su";
  const auto made = Rotary::Create("layer.rotary", embedding, 8, 0);
  EXPECT_EQ(made.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(ErrorReason(made.status()), "UNSUPPORTED_MODEL");
  EXPECT_EQ(ErrorDetailsOf(made.status())["field"], "layer.rotary.scaling");
}

}  // namespace
}  // namespace attn
