// How much of the attention the sparse implementation's selection keeps, beside an oracle that
// knows every weight and keeps the heaviest pages at the same budget.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "core/attention_implementation.h"
#include "core/device.h"

namespace attn::bench {

struct Recovery {
  double recovered_mass = 0.0;  // mean over the rows of the sampled tasks
  double oracle_mass = 0.0;     // the same rows, the oracle's pages
  double sparsity = 0.0;        // of the sampled tasks
  std::int64_t tasks = 0;
  std::int64_t rows = 0;
};

// Of a problem of one sequence of plain tensors, on `samples` of its tasks, evenly spaced. The
// oracle's unit and budget are the selection's: whole pages for all rows of a task, of which it
// keeps the same ones always, and no more visible (query, key) pairs. On the executor's driver.
absl::StatusOr<Recovery> MeasureRecovery(const kernels::AttentionArgs& args,
                                         const SparsityOptions& sparsity, std::int64_t samples,
                                         ExecutionContext& context);

}  // namespace attn::bench
