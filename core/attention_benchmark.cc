#include "core/attention_benchmark.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

// Fewer timed executions have no median to speak of, more of them do not move it.
constexpr std::size_t kFewestIterations = 9;
constexpr std::size_t kMostIterations = 200;
// A median is steady when its standard error, estimated from the quartiles, is below this part of
// it.
constexpr double kSteady = 0.01;
// Shorter executions are preceded by one that is not timed.
constexpr double kShortSeconds = 0.001;

constexpr char kOutOfTime[] = "the benchmark's time was over before it had executed";

double SecondsSince(BenchmarkClock::time_point start) {
  return std::chrono::duration<double>(BenchmarkClock::now() - start).count();
}

bool IsSteady(std::vector<double> seconds) {
  if (seconds.size() < kFewestIterations) return false;
  if (seconds.size() >= kMostIterations) return true;
  std::sort(seconds.begin(), seconds.end());
  const double spread = Quantile(seconds, 0.75) - Quantile(seconds, 0.25);
  // 0.93 (q3 - q1) / sqrt(n): of a median of normally distributed values.
  const double error = 0.93 * spread / std::sqrt(static_cast<double>(seconds.size()));
  return error <= kSteady * Quantile(seconds, 0.5);
}

}  // namespace

double Quantile(const std::vector<double>& sorted, double q) {
  const double rank = std::ceil(q * static_cast<double>(sorted.size()));
  const auto index = static_cast<std::size_t>(std::max(rank, 1.0)) - 1;
  return sorted[std::min(index, sorted.size() - 1)];
}

double ExactTolerance(const AttentionShape& shape) {
  const auto of = [](DType dtype) {
    switch (dtype) {
      case DType::kFloat16:
        return 4e-3;
      case DType::kBFloat16:
        return 3e-2;
      case DType::kInt8:
        return 5e-2;
      default:
        return 1e-4;
    }
  };
  return std::max({of(shape.dtype), of(shape.kv_dtype), of(shape.output_dtype)});
}

absl::Status AttentionBenchmark::Choose() {
  const ImplementationTable table = manager_.table();
  std::vector<const ImplementationRow*> rows;
  for (const std::string& name : options_.implementations) {
    ATTN_ASSIGN_OR_RETURN(rows.emplace_back(), RequireImplementation(table, name));
  }
  if (rows.empty()) {
    for (const ImplementationRow& row : table) {
      if (row.supports(problem_.shape()).ok()) rows.push_back(&row);
    }
  }
  const int workers = manager_.device().executor().threads();
  for (const ImplementationRow* row : rows) {
    Candidate& candidate = candidates_.emplace_back();
    candidate.row = row;
    candidate.implementation = &manager_.implementation(*row);
    candidate.result.implementation = row->name;
    candidate.result.backend = manager_.device().backend();
    const absl::Status supported = row->supports(problem_.shape());
    if (!supported.ok()) {
      candidate.result.error = std::string(supported.message());
      continue;
    }
    const std::uint64_t bytes =
        candidate.implementation->WorkspaceBytes(problem_.shape(), workers).bytes;
    if (!workspace_.meter().Allows(bytes)) {
      candidate.result.error =
          absl::StrCat("it takes ", bytes, " bytes of scratch memory, more than the benchmark has");
    }
  }
  return absl::OkStatus();
}

absl::Status AttentionBenchmark::Pause(double busy_seconds) {
  const double rest = busy_seconds * (1.0 - options_.share) / options_.share;
  if (!(rest > 0.0)) return absl::OkStatus();
  const auto until = BenchmarkClock::now() + std::chrono::duration_cast<BenchmarkClock::duration>(
                                                 std::chrono::duration<double>(rest));
  return runner_.PauseUntil(std::min(until, options_.deadline));
}

// The reference runs on the caller's thread, not on the device, but on the same cores: it pauses
// too.
absl::Status AttentionBenchmark::MakeReference() {
  BenchmarkClock::time_point start = BenchmarkClock::now();
  const auto between = [&]() -> absl::Status {
    ATTN_RETURN_IF_ERROR(Pause(SecondsSince(start)));
    start = BenchmarkClock::now();
    return absl::OkStatus();
  };
  ATTN_ASSIGN_OR_RETURN(reference_, ReferenceSample::Create(problem_.plain_args(), between));
  return absl::OkStatus();
}

absl::StatusOr<double> AttentionBenchmark::Execute(Candidate& candidate, bool first) {
  double busy = 0.0;
  double seconds = 0.0;
  absl::Status executed;
  const auto once = [&](const bool* stop) {
    workspace_.Reset();
    ExecutionContext context{manager_.device(), workspace_, stop};
    context.sparsity = options_.sparsity;
    context.memory_budget = options_.memory_budget;
    const BenchmarkClock::time_point start = BenchmarkClock::now();
    executed = GuardMemory([&] {
      return candidate.implementation->Attend(problem_.args(), problem_.shape(), context);
    });
    seconds = SecondsSince(start);
    candidate.result.peak_workspace_bytes =
        std::max<std::uint64_t>(candidate.result.peak_workspace_bytes, workspace_.meter().peak());
    candidate.result.flops = context.flops;
    workspace_.Reset();
  };
  const auto job = [&](const bool* stop) {
    const BenchmarkClock::time_point start = BenchmarkClock::now();
    if (first) problem_.PoisonOutputs();
    const bool is_short = !first && candidate.first_seconds < kShortSeconds;
    if (is_short) once(stop);
    once(stop);
    busy = SecondsSince(start);
  };
  ATTN_RETURN_IF_ERROR(runner_.Execute(job, options_.deadline));
  ATTN_RETURN_IF_ERROR(Pause(busy));
  if (!executed.ok()) {
    candidate.result.error = absl::StrCat(absl::StatusCodeToString(executed.code()), ": ",
                                          std::string(executed.message()));
  }
  return seconds;
}

absl::Status AttentionBenchmark::Took(Candidate& candidate, const absl::StatusOr<double>& seconds) {
  if (absl::IsDeadlineExceeded(seconds.status())) {
    if (candidate.first_seconds == 0.0 && candidate.result.error.empty()) {
      candidate.result.error = kOutOfTime;
    }
    return absl::OkStatus();
  }
  ATTN_RETURN_IF_ERROR(seconds.status());
  ++executions_;
  return absl::OkStatus();
}

// The first execution, and what its results are worth.
absl::Status AttentionBenchmark::Check(Candidate& candidate) {
  const absl::StatusOr<double> seconds = Execute(candidate, true);
  ATTN_RETURN_IF_ERROR(Took(candidate, seconds));
  if (!seconds.ok() || !candidate.result.error.empty()) return absl::OkStatus();
  candidate.first_seconds = *seconds;
  candidate.result.errors = reference_.Compare(problem_.args());
  return absl::OkStatus();
}

void AttentionBenchmark::Report(const Candidate& candidate) {
  if (!options_.progress) return;
  const std::size_t each = options_.iterations != 0 ? options_.iterations : kMostIterations;
  const double done =
      static_cast<double>(executions_) / static_cast<double>(candidates_.size() * (each + 1));
  double passed = 0.0;
  if (options_.deadline != BenchmarkClock::time_point::max()) {
    passed =
        SecondsSince(start_) / std::chrono::duration<double>(options_.deadline - start_).count();
  }
  fraction_ = std::clamp(std::max(done, passed), fraction_, 1.0);
  options_.progress(candidate.row->name, fraction_);
}

absl::Status AttentionBenchmark::Rounds() {
  for (std::size_t round = 0; !OutOfTime(); ++round) {
    bool all_ended = true;
    for (std::size_t i = 0; i < candidates_.size() && !OutOfTime(); ++i) {
      // Another one comes first in each round: none always follows the same one.
      Candidate& candidate = candidates_[(i + round) % candidates_.size()];
      if (candidate.ended()) continue;
      all_ended = false;
      Report(candidate);
      const absl::StatusOr<double> seconds = Execute(candidate, false);
      ATTN_RETURN_IF_ERROR(Took(candidate, seconds));
      if (!seconds.ok()) return absl::OkStatus();  // the time is over
      if (!candidate.result.error.empty()) continue;
      candidate.seconds.push_back(*seconds);
      candidate.steady = options_.iterations != 0 ? candidate.seconds.size() >= options_.iterations
                                                  : IsSteady(candidate.seconds);
    }
    if (all_ended) return absl::OkStatus();
  }
  return absl::OkStatus();
}

void AttentionBenchmark::Summarize(Candidate& candidate) const {
  BenchmarkResult& result = candidate.result;
  if (!result.error.empty()) return;
  if (candidate.seconds.empty()) candidate.seconds.push_back(candidate.first_seconds);
  std::sort(candidate.seconds.begin(), candidate.seconds.end());
  result.median_seconds = Quantile(candidate.seconds, 0.5);
  result.min_seconds = candidate.seconds.front();
  result.p95_seconds = Quantile(candidate.seconds, 0.95);
  result.iterations = static_cast<std::uint32_t>(candidate.seconds.size());
}

absl::StatusOr<std::vector<BenchmarkResult>> AttentionBenchmark::Run() {
  ATTN_RETURN_IF_ERROR(Choose());
  const bool any = std::any_of(candidates_.begin(), candidates_.end(),
                               [](const Candidate& c) { return c.result.error.empty(); });
  if (any) ATTN_RETURN_IF_ERROR(MakeReference());
  for (Candidate& candidate : candidates_) {
    if (!candidate.result.error.empty()) continue;
    Report(candidate);
    ATTN_RETURN_IF_ERROR(Check(candidate));
  }
  ATTN_RETURN_IF_ERROR(Rounds());
  std::vector<BenchmarkResult> results;
  for (Candidate& candidate : candidates_) {
    Summarize(candidate);
    results.push_back(std::move(candidate.result));
  }
  return results;
}

absl::StatusOr<std::vector<BenchmarkResult>> AttentionManager::BenchmarkAttentionTypes(
    BenchmarkProblem& sample, Workspace& workspace, BenchmarkRunner& runner,
    const BenchmarkOptions& options) {
  return AttentionBenchmark(*this, sample, workspace, runner, options).Run();
}

absl::StatusOr<std::vector<BenchmarkResult>> ManagerPool::BenchmarkAttentionTypes(
    BenchmarkProblem& sample, Workspace& workspace, BenchmarkRunner& runner,
    const BenchmarkOptions& options) {
  return managers_.front()->BenchmarkAttentionTypes(sample, workspace, runner, options);
}

void RecordTimings(const std::vector<BenchmarkResult>& results, ImplementationTable table,
                   const AttentionShape& shape, MeasuredTimings& timings) {
  for (const BenchmarkResult& result : results) {
    const ImplementationRow* const row = FindImplementation(table, result.implementation);
    if (!result.error.empty() || row == nullptr || !(result.median_seconds > 0.0)) continue;
    if (row->traits.exact && !(result.errors.relative <= ExactTolerance(shape))) continue;
    timings.Record({result.implementation, shape, result.median_seconds});
  }
}

}  // namespace attn
