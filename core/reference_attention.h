// Attention in double precision, row by row: what benchmarks and switches hold implementations
// against while the server runs. Slow: for samples of few rows.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/attention_args.h"

namespace attn {

// Row `row` of head `head` of a sequence of `args`: its output, value_dim numbers. Every option of
// AttentionArgs but pages (FAILED_PRECONDITION); a row that sees no key is zeros.
absl::StatusOr<std::vector<double>> ReferenceRow(const kernels::AttentionArgs& args,
                                                 std::int64_t sequence, std::int64_t row,
                                                 std::int64_t head);

}  // namespace attn
