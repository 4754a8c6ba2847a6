#include "server/benchmark_handlers.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "server/benchmark_runner.h"
#include "server/version.h"

namespace attn::server {
namespace {

constexpr double kMaxSeconds = 3600.0;
constexpr std::uint32_t kMaxIterations = 100000;
constexpr std::chrono::milliseconds kReportInterval(50);

Clock::duration Seconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

absl::Status CheckLimits(const BenchmarkCall& call, ImplementationTable table) {
  if (!(call.max_seconds >= 0.0 && call.max_seconds <= kMaxSeconds)) {
    return InvalidField("max_seconds", absl::StrCat("max_seconds is ", call.max_seconds,
                                                    ", but must be in [0, ", kMaxSeconds, "]"));
  }
  if (call.iterations > kMaxIterations) {
    return InvalidField("iterations", absl::StrCat("iterations is ", call.iterations,
                                                   ", but must be at most ", kMaxIterations));
  }
  std::set<std::string> names;
  for (const std::string& name : call.implementations) {
    ATTN_RETURN_IF_ERROR(RequireImplementation(table, name).status());
    if (!names.insert(name).second) {
      return InvalidField("implementations",
                          absl::StrCat("implementations names ", name, " twice"));
    }
  }
  return absl::OkStatus();
}

// One benchmark, on the benchmarks' thread.
class Benchmark {
 public:
  Benchmark(ServerState& state, BenchmarkCall call, std::shared_ptr<CallContext> context,
            std::shared_ptr<ManagerPool> pool, Clock::time_point deadline)
      : state_(state),
        call_(std::move(call)),
        context_(std::move(context)),
        pool_(std::move(pool)),
        device_(pool_->managers().front()->device()),
        deadline_(deadline),
        max_bytes_(call_.max_bytes != 0 ? call_.max_bytes : state.options().benchmarks.max_bytes),
        runner_(state.queue(device_), context_) {}

  absl::Status Run() {
    ATTN_ASSIGN_OR_RETURN(const std::unique_ptr<BenchmarkProblem> problem, MakeProblem());
    // Kept and held blocks together stay within the rest of the memory.
    const std::uint64_t rest = (max_bytes_ - std::min(max_bytes_, problem->bytes())) / 2;
    const std::uint64_t limit = std::min(rest, state_.limits().max_workspace_bytes);
    Workspace workspace(device_, limit, limit);
    BenchmarkOptions options;
    options.implementations = call_.implementations;
    options.iterations = call_.iterations;
    options.deadline = deadline_;
    options.share = state_.options().benchmarks.share;
    options.memory_budget = state_.limits().memory_efficient_bytes;
    options.sparsity = pool_->model()->spec().sparsity;
    options.progress = [this](const std::string& implementation, double fraction) {
      Report(implementation, fraction);
    };
    ATTN_ASSIGN_OR_RETURN(const std::vector<BenchmarkResult> results,
                          pool_->BenchmarkAttentionTypes(*problem, workspace, runner_, options));
    for (const BenchmarkResult& result : results) Send(EncodeBenchmarkResult(result), true);
    Send(EncodeBenchmarkProgress("", 1.0), true);
    ModelRegistry& registry = state_.registry();
    RecordTimings(results, registry.table(), problem->shape(), registry.timings());
    KeepTimings();
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<std::unique_ptr<BenchmarkProblem>> MakeProblem() {
    BenchmarkTarget target;
    target.pool = pool_;
    target.layer = call_.layer;
    target.max_tokens = state_.limits().max_tokens;
    target.max_bytes = max_bytes_;
    target.share = state_.options().benchmarks.share;
    target.reserve = [this](std::uint64_t bytes) -> absl::Status {
      ATTN_ASSIGN_OR_RETURN(MemoryBudget::Reservation share, state_.budget().Reserve(bytes));
      context_->Hold(std::move(share));
      return absl::OkStatus();
    };
    if (call_.shape) return BenchmarkProblem::Random(target, *call_.shape, runner_, deadline_);
    Workspace workspace(device_, std::min(max_bytes_ / 2, state_.limits().max_workspace_bytes), 0);
    return BenchmarkProblem::FromHiddenStates(target, call_.hidden_states, workspace, runner_,
                                              deadline_);
  }

  void Send(Answer answer, bool needed) {
    if (context_->send) context_->send(std::move(answer), needed);
  }

  void Report(const std::string& implementation, double fraction) {
    const Clock::time_point now = Clock::now();
    if (now < next_report_) return;
    next_report_ = now + kReportInterval;
    Send(EncodeBenchmarkProgress(implementation, fraction), false);
  }

  void KeepTimings() {
    const BenchmarkSettings& settings = state_.options().benchmarks;
    if (settings.timings_file.empty()) return;
    const absl::Status saved =
        SaveTimings(settings.timings_file, TimingsKeyOf(state_), state_.registry().timings());
    if (!saved.ok() && settings.warn) settings.warn(std::string(saved.message()));
  }

  ServerState& state_;
  const BenchmarkCall call_;
  const std::shared_ptr<CallContext> context_;
  const std::shared_ptr<ManagerPool> pool_;
  Device& device_;
  const Clock::time_point deadline_;
  const std::uint64_t max_bytes_;
  QueueRunner runner_;
  Clock::time_point next_report_;
};

}  // namespace

void HandleBenchmarkAttention(ServerState& state, BenchmarkCall call,
                              std::shared_ptr<CallContext> context,
                              std::function<void(absl::Status)> done) {
  absl::StatusOr<std::shared_ptr<ManagerPool>> pool = state.registry().Find(call.layer.model);
  if (!pool.ok()) return done(pool.status());
  context->facts.model = call.layer.model;
  if (absl::Status limits = CheckLimits(call, state.registry().table()); !limits.ok()) {
    return done(std::move(limits));
  }
  const double seconds =
      call.max_seconds > 0.0 ? call.max_seconds : state.options().benchmarks.default_seconds;
  const Clock::time_point deadline = std::min(Clock::now() + Seconds(seconds), context->deadline);
  absl::Status taken = state.benchmark_seat().Take(context, deadline);
  if (!taken.ok()) return done(std::move(taken));
  state.benchmarks().Post([&state, held = std::make_shared<BenchmarkCall>(std::move(call)), context,
                           pool = *std::move(pool), deadline, done = std::move(done)] {
    absl::Status status = GuardMemory(
        [&] { return Benchmark(state, std::move(*held), context, pool, deadline).Run(); });
    if (const absl::Status reason = state.benchmark_seat().Reason(*context); !reason.ok()) {
      status = reason;
    }
    state.benchmark_seat().Leave();
    done(std::move(status));
  });
}

TimingsKey TimingsKeyOf(const ServerState& state) {
  return {DescribeTimingsHardware(state.options().cpu.threads), kVersion};
}

}  // namespace attn::server
