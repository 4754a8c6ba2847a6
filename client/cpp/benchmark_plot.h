// A benchmark's results as a picture: an SVG of a bar per implementation.
#pragma once

#include <string>
#include <vector>

#include "attention/v1/admin.pb.h"

namespace attn::client {

// Bars as long as the medians, fastest first, whiskers from the minimum to the 95th percentile;
// those that could not run say why. `title` and names may hold anything.
std::string BenchmarkSvg(const std::string& title,
                         std::vector<attention::v1::BenchmarkResult> results);

}  // namespace attn::client
