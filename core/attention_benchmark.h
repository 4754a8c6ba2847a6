// Implementations side by side on one problem, while the device serves: rounds in which each of
// them executes once, in changing order, until their medians are steady or the time is over.
// Between executions the device is left to others for as long as its share says.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/attention_manager.h"
#include "core/benchmark_problem.h"
#include "core/benchmark_reference.h"
#include "core/benchmark_runner.h"
#include "core/measured_timings.h"

namespace attn {

inline constexpr double kDefaultBenchmarkShare = 0.25;
inline constexpr double kDefaultBenchmarkSeconds = 10.0;
inline constexpr std::uint64_t kDefaultBenchmarkBytes = std::uint64_t{1} << 30;

struct BenchmarkOptions {
  std::vector<std::string> implementations;  // empty: all that can execute the problem
  std::uint32_t iterations = 0;  // of each, beside the first; 0: as many as a steady median needs
  BenchmarkClock::time_point deadline = BenchmarkClock::time_point::max();
  double share = kDefaultBenchmarkShare;               // of the device's time, in (0, 1]
  std::uint64_t memory_budget = kDefaultMemoryBudget;  // of memory_efficient
  SparsityOptions sparsity;
  // Of the whole benchmark, in [0, 1] and never falling.
  std::function<void(const std::string& implementation, double fraction)> progress;
};

struct BenchmarkResult {
  std::string implementation;
  std::string backend;
  // Of the timed executions. The first one of each implementation, whose result is checked, is not
  // among them unless the time was over before another.
  double median_seconds = 0.0;
  double min_seconds = 0.0;
  double p95_seconds = 0.0;
  std::uint32_t iterations = 0;
  std::uint64_t peak_workspace_bytes = 0;
  std::uint64_t flops = 0;
  ErrorFigures errors;
  std::string error;  // why it did not execute; then there are no figures
};

// The q-th quantile by nearest rank; `sorted` is not empty.
double Quantile(const std::vector<double>& sorted, double q);

// What benchmarks are allowed to be off by where the implementation is exact: rounding of the
// dtypes, the cache's included. Timings of one that is off by more are not to be used.
double ExactTolerance(const AttentionShape& shape);

class AttentionBenchmark {
 public:
  // All of them outlive the benchmark. `workspace` is the benchmark's own: what an execution may
  // hold, and what stays allocated, is its limit.
  AttentionBenchmark(AttentionManager& manager, BenchmarkProblem& problem, Workspace& workspace,
                     BenchmarkRunner& runner, const BenchmarkOptions& options)
      : manager_(manager),
        problem_(problem),
        workspace_(workspace),
        runner_(runner),
        options_(options) {}

  // In the order of the table, or of the names. NOT_FOUND for an unknown name; CANCELLED. A
  // deadline that comes before the end is none: results have what there was time for.
  absl::StatusOr<std::vector<BenchmarkResult>> Run();

 private:
  struct Candidate {
    const ImplementationRow* row = nullptr;
    const AttentionImplementation* implementation = nullptr;
    std::vector<double> seconds;
    double first_seconds = 0.0;
    bool steady = false;
    BenchmarkResult result;
    bool ended() const { return steady || !result.error.empty(); }
  };

  absl::Status Choose();
  absl::Status MakeReference();
  // Executes it once, or twice where it is short: the first one wakes workers and fills caches, as
  // steady traffic has them. The time of the last one.
  absl::StatusOr<double> Execute(Candidate& candidate, bool first);
  absl::Status Check(Candidate& candidate);
  absl::Status Rounds();
  // Accounts for a failure: of the candidate alone, of the time (Rounds ends), or of the benchmark.
  absl::Status Took(Candidate& candidate, const absl::StatusOr<double>& seconds);
  void Summarize(Candidate& candidate) const;
  bool OutOfTime() const { return BenchmarkClock::now() >= options_.deadline; }
  absl::Status Pause(double busy_seconds);
  void Report(const Candidate& candidate);

  AttentionManager& manager_;
  BenchmarkProblem& problem_;
  Workspace& workspace_;
  BenchmarkRunner& runner_;
  const BenchmarkOptions& options_;
  const BenchmarkClock::time_point start_ = BenchmarkClock::now();
  ReferenceSample reference_;
  std::vector<Candidate> candidates_;
  std::size_t executions_ = 0;
  double fraction_ = 0.0;
};

// Those results that the selector may go by, into `timings`: of implementations that executed and,
// where they are exact, were right.
void RecordTimings(const std::vector<BenchmarkResult>& results, ImplementationTable table,
                   const AttentionShape& shape, MeasuredTimings& timings);

}  // namespace attn
