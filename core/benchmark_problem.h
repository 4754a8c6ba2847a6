// What a benchmark executes again and again: one attention problem with its tensors, of random
// values or taken out of a real Forward, and the same problem as the double-precision reference
// reads it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "core/attention_problem.h"
#include "core/benchmark_runner.h"
#include "core/cache_call.h"
#include "core/hosted_model.h"
#include "core/manager_pool.h"

namespace attn {

// Fields and their meaning are those of the API's AttentionShape.
struct BenchmarkShape {
  std::int64_t batch = 0;
  std::int64_t q_len = 0;
  std::int64_t kv_len = 0;
  DType dtype = DType::kUnspecified;  // unset: the model's
  bool cached = false;                // keys and values lie in the pages of caches
  bool has_mask = false;              // a bool mask that hides one key in eight
  bool output_attentions = false;
  bool output_lse = false;
  std::vector<std::int64_t> query_lengths;
  std::vector<std::int64_t> kv_lengths;
};

// The layer whose attention is executed, and what the problem may take.
struct BenchmarkTarget {
  std::shared_ptr<ManagerPool> pool;  // of a hosted model
  LayerRef layer;
  std::int64_t max_tokens = 0;
  std::uint64_t max_bytes = 0;  // of tensors and pages
  double share = 1.0;           // of a core's time that making values may take
  // Asked before they are allocated; may be empty.
  std::function<absl::Status(std::uint64_t bytes)> reserve;
};

class BenchmarkProblem {
 public:
  // Values of variance 1. INVALID_ARGUMENT naming the field; RESOURCE_EXHAUSTED (reason
  // BENCHMARK_BYTES) beyond max_bytes, before anything is allocated; DEADLINE_EXCEEDED, CANCELLED.
  static absl::StatusOr<std::unique_ptr<BenchmarkProblem>> Random(
      const BenchmarkTarget& target, const BenchmarkShape& shape, BenchmarkRunner& runner,
      BenchmarkClock::time_point deadline);

  // The attention inside Forward on these hidden states [batch, q_len, hidden_size]: they are
  // projected, normalised and rotated once, and what came out is kept. Errors as above, and
  // FAILED_PRECONDITION without weights. `workspace` is used for that one execution.
  static absl::StatusOr<std::unique_ptr<BenchmarkProblem>> FromHiddenStates(
      const BenchmarkTarget& target, const TensorView& hidden_states, Workspace& workspace,
      BenchmarkRunner& runner, BenchmarkClock::time_point deadline);

  const AttentionShape& shape() const { return problem_->shape(); }
  const kernels::AttentionArgs& args() const { return problem_->args(); }
  // The same without pages, its keys and values in the query's dtype.
  const kernels::AttentionArgs& plain_args() const { return plain_->args(); }

  std::uint64_t bytes() const { return bytes_; }

  // Overwrites the outputs by NaN, so that what is not written is seen.
  void PoisonOutputs();

 private:
  explicit BenchmarkProblem(const BenchmarkTarget& target) : target_(target) {}

  absl::Status Find();
  AttendInputs InputsOf(const BenchmarkShape& shape) const;
  // Checks, then allocates; inputs_ has its tensors then.
  absl::Status Prepare(const BenchmarkShape& shape);
  absl::Status FillRandom(BenchmarkRunner& runner, BenchmarkClock::time_point deadline);
  absl::Status MakePlain();
  absl::Status FillCache(const BenchmarkShape& shape, BenchmarkRunner& runner,
                         BenchmarkClock::time_point deadline);
  absl::Status BindOutputs();
  absl::StatusOr<TensorView> Allocate(DType dtype, const std::vector<std::int64_t>& shape);

  const BenchmarkTarget target_;  // keeps the model
  const HostedLayer* layer_ = nullptr;
  AttendInputs inputs_;  // of the plain problem
  std::unique_ptr<AttentionProblem> plain_;
  std::unique_ptr<AttentionProblem> paged_;
  AttentionProblem* problem_ = nullptr;  // that is executed: one of the two
  // Caches of the benchmark's own, beside the server's budget for sessions.
  std::shared_ptr<CachePool> cache_;
  std::vector<std::shared_ptr<Session>> sessions_;
  std::shared_ptr<CacheCall> reading_;
  std::vector<Buffer> buffers_;
  std::size_t first_output_ = 0;  // index into buffers_
  std::uint64_t bytes_ = 0;
};

}  // namespace attn
