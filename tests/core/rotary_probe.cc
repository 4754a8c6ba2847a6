// Reads one JSON object from standard input and writes what core makes of it, so that tests in
// Python can hold the rotary embedding against other libraries':
//   {"embedding": {"theta": ..., ...}, "head_dim": D, "positions": [[axis 0 ...], ...],
//    "vectors": [[D numbers] for each token]}
//   -> {"axes": A, "needs_positions": ..., "vectors": [...]} or {"error": text}
// The row's largest position is that of `positions`; one axis in `positions` serves all.
#include <algorithm>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/rotary.h"

namespace attn {
namespace {

using nlohmann::json;

RotaryEmbedding ReadEmbedding(const json& object) {
  RotaryEmbedding embedding;
  embedding.theta = object.at("theta");
  embedding.rotary_dim = object.value("rotary_dim", 0u);
  embedding.interleaved = object.value("interleaved", false);
  embedding.scaling = object.value("scaling", "");
  embedding.scaling_parameters =
      object.value("scaling_parameters", std::map<std::string, double>());
  embedding.short_factor = object.value("short_factor", std::vector<double>());
  embedding.long_factor = object.value("long_factor", std::vector<double>());
  embedding.axis_sections = object.value("axis_sections", std::vector<std::uint32_t>());
  embedding.frequencies_per_axis = object.value("frequencies_per_axis", false);
  return embedding;
}

json Probe(const json& request) {
  const std::int64_t head_dim = request.at("head_dim");
  const auto made = Rotary::Create("rotary", ReadEmbedding(request.at("embedding")), head_dim, 0);
  if (!made.ok()) return {{"error", std::string(made.status().message())}};
  const Rotary& rotary = **made;

  std::vector<std::int64_t> positions;
  for (const json& axis : request.at("positions")) {
    for (const std::int64_t position : axis) positions.push_back(position);
  }
  auto vectors = request.at("vectors").get<std::vector<std::vector<float>>>();
  const auto count = static_cast<std::int64_t>(vectors.size());
  const bool one_axis = request.at("positions").size() == 1;
  const auto pairs = static_cast<std::size_t>(rotary.pairs());
  std::vector<float> cos(vectors.size() * pairs);
  std::vector<float> sin(cos.size());
  rotary.Angles(positions.data(), one_axis ? 0 : count, count,
                *std::max_element(positions.begin(), positions.end()), cos.data(), sin.data());
  for (std::size_t i = 0; i < vectors.size(); ++i) {
    rotary.Rotate(vectors[i].data(), DType::kFloat32, cos.data() + i * pairs,
                  sin.data() + i * pairs);
  }
  return {
      {"axes", rotary.axes()}, {"needs_positions", rotary.needs_positions()}, {"vectors", vectors}};
}

}  // namespace
}  // namespace attn

int main() {
  const std::string text((std::istreambuf_iterator<char>(std::cin)),
                         std::istreambuf_iterator<char>());
  std::cout << attn::Probe(nlohmann::json::parse(text)).dump() << "\n";
  return 0;
}
