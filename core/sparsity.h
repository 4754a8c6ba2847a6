// What an approximate implementation may leave out, and what it did leave out.
#pragma once

#include <optional>

namespace attn {

struct SparsityOptions {
  std::optional<double> factor;  // share of the visible pairs to leave out, in [0, 1)
  std::optional<double> mass;    // attention mass to keep, in (0, 1]; at most one of the two is set

  bool set() const { return factor.has_value() || mass.has_value(); }
};

// `first` where it says anything, else `second`.
inline const SparsityOptions& Override(const SparsityOptions& second,
                                       const SparsityOptions& first) {
  return first.set() ? first : second;
}

// What is kept where nobody says anything.
constexpr double kDefaultMass = 0.95;

// Of one execution.
struct SparsityReport {
  double sparsity = 0.0;        // 1 - computed pairs / pairs that positions leave visible
  double recovered_mass = 1.0;  // of the rows that were audited, a mean
};

}  // namespace attn
