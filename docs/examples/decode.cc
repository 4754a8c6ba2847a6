// A decode loop against a hosted model: a prompt, a few steps, and two continuations that share it.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "client/cpp/session.h"

using attn::client::Client;
using attn::client::Session;
using attn::client::Tensor;

template <typename T>
T OrExit(absl::StatusOr<T> result) {
  if (result.ok()) return *std::move(result);
  std::fprintf(stderr, "decode: %s\n", result.status().ToString().c_str());
  std::exit(1);
}

// Runs `tokens` random hidden states through every layer, each layer's output into the next one. A
// real model has its norms, its MLP and the residual in between.
void Append(Session& session, uint32_t layers, int64_t hidden_size, int64_t tokens) {
  static std::mt19937 random(1);
  std::vector<float> values(static_cast<size_t>(tokens * hidden_size));
  for (float& value : values) value = std::normal_distribution<float>()(random);
  Tensor hidden = OrExit(Tensor::FromFloats({1, tokens, hidden_size}, values));
  for (uint32_t layer = 0; layer < layers; ++layer) {
    hidden = OrExit(session.Forward({.layer = {layer}, .hidden_states = hidden})).output;
  }
}

int main(int argc, char** argv) {
  if (argc != 5) return std::fprintf(stderr, "usage: decode ADDRESS MODEL LAYERS HIDDEN_SIZE\n"), 2;
  const auto layers = static_cast<uint32_t>(std::atoi(argv[3]));
  const int64_t hidden_size = std::atoi(argv[4]);
  const std::unique_ptr<Client> client = OrExit(Client::Create(argv[1], {.timeout_seconds = 30}));
  Session session = OrExit(client->OpenSession({.model = argv[2]}));
  Append(session, layers, hidden_size, 12);
  for (int step = 0; step < 4; ++step) Append(session, layers, hidden_size, 1);

  std::vector<Session> forks = OrExit(session.Fork(2));
  Append(forks[0], layers, hidden_size, 3);
  Append(forks[1], layers, hidden_size, 5);
  for (const Session* each : {&session, &forks[0], &forks[1]}) {
    std::printf("%lld tokens\n", static_cast<long long>(each->length({.index = 0})));
  }
}
