// What the examples of core share: raw float32 values from standard input, and a number that tells
// two outputs apart.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

template <typename T>
T OrExit(absl::StatusOr<T> result) {
  if (result.ok()) return *std::move(result);
  std::fprintf(stderr, "%s\n", result.status().ToString().c_str());
  std::exit(1);
}

inline std::vector<float> ReadFloats() {
  std::vector<float> values(1);
  std::size_t count = 0;
  while (std::fread(&values[count], sizeof(float), 1, stdin) == 1) values.resize(++count + 1);
  values.resize(count);
  return values;
}

// Every value counts, and where it stands.
inline double Checksum(const float* values, std::int64_t count) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    sum += static_cast<double>(1 + i % 17) * static_cast<double>(values[i]);
  }
  return sum;
}
