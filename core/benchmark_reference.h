// How far an implementation's results are from core/reference_attention.h, on a sample of rows and
// heads: all of them would take longer than the benchmark.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention_args.h"

namespace attn {

struct ErrorFigures {
  double max_abs = 0.0;   // NaN where a result is none
  double relative = 0.0;  // ||o - ref|| / ||ref||, over the sample
};

class ReferenceSample {
 public:
  // 4 to 64 rows, fewer where keys are many: first and last rows of sequences, and others between
  // them, spread over the heads. `args` has no pages. `between` is called between rows and ends
  // the work by an error. A problem without rows has an empty sample.
  static absl::StatusOr<ReferenceSample> Create(const kernels::AttentionArgs& args,
                                                absl::FunctionRef<absl::Status()> between);

  // Of the outputs that `args`, the same problem with or without pages, points to.
  ErrorFigures Compare(const kernels::AttentionArgs& args) const;

  std::size_t size() const { return rows_.size(); }

 private:
  struct Row {
    std::int64_t sequence = 0;
    std::int64_t row = 0;
    std::int64_t head = 0;
    std::vector<double> output;
  };
  std::vector<Row> rows_;
};

}  // namespace attn
