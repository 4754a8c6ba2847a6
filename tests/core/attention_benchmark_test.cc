// Benchmarks: figures that are right, faults that are seen, bounds of time and memory, the share
// of the device's time, cancellation.
#include "core/attention_benchmark.h"

#include <gtest/gtest.h>

#include <cmath>
#include <thread>

#include "core/error.h"
#include "core/model_registry.h"
#include "tests/core/core_fixture.h"

namespace attn {
namespace {

constexpr std::uint64_t kBytes = std::uint64_t{256} << 20;

const ImplementationRow& BuiltIn(const std::string& name) {
  return *FindImplementation(BuiltInImplementations(), name);
}

// What the standard implementation computes, with something done to it.
class Changed : public AttentionImplementation {
 public:
  MemoryUsage WorkspaceBytes(const AttentionShape& shape, int workers) const override {
    return inner_->WorkspaceBytes(shape, workers);
  }
  absl::Status Attend(const kernels::AttentionArgs& args, const AttentionShape& shape,
                      ExecutionContext& context) const override {
    return inner_->Attend(args, shape, context);
  }

 private:
  const std::unique_ptr<AttentionImplementation> inner_ = BuiltIn("standard").create();
};

class Wrong final : public Changed {
 public:
  absl::Status Attend(const kernels::AttentionArgs& args, const AttentionShape& shape,
                      ExecutionContext& context) const override {
    absl::Status status = Changed::Attend(args, shape, context);
    for (std::int64_t i = 0; i < args.num_sequences; ++i) {
      const kernels::MutableRowsView& output = args.sequences[i].output;
      for (std::int64_t row = 0; row < args.sequences[i].q_len; ++row) {
        for (std::int64_t head = 0; head < args.num_heads; ++head) {
          static_cast<float*>(output.data)[row * output.row_stride + head * output.head_stride] +=
              0.25f;
        }
      }
    }
    return status;
  }
};

class Silent final : public Changed {  // writes nothing
 public:
  absl::Status Attend(const kernels::AttentionArgs&, const AttentionShape&,
                      ExecutionContext&) const override {
    return absl::OkStatus();
  }
};

class Failing final : public Changed {
 public:
  absl::Status Attend(const kernels::AttentionArgs&, const AttentionShape&,
                      ExecutionContext&) const override {
    return absl::InternalError("planted");
  }
};

class Slow final : public Changed {
 public:
  absl::Status Attend(const kernels::AttentionArgs& args, const AttentionShape& shape,
                      ExecutionContext& context) const override {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    return Changed::Attend(args, shape, context);
  }
};

class Greedy final : public Changed {
 public:
  MemoryUsage WorkspaceBytes(const AttentionShape&, int) const override {
    return {std::uint64_t{1} << 40, true};
  }
};

template <typename Implementation>
ImplementationRow RowOf(const char* name) {
  ImplementationRow row = BuiltIn("standard");
  row.name = name;
  row.create = [] { return std::unique_ptr<AttentionImplementation>(new Implementation()); };
  return row;
}

ImplementationTable FaultyTable() {
  static const std::vector<ImplementationRow> rows = {
      BuiltIn("flash"),        BuiltIn("standard"),       RowOf<Wrong>("wrong"),
      RowOf<Silent>("silent"), RowOf<Failing>("failing"), RowOf<Slow>("slow"),
      RowOf<Greedy>("greedy"),
  };
  return rows;
}

BenchmarkClock::time_point In(double seconds) {
  return BenchmarkClock::now() + std::chrono::duration_cast<BenchmarkClock::duration>(
                                     std::chrono::duration<double>(seconds));
}

double Seconds(BenchmarkClock::time_point start) {
  return std::chrono::duration<double>(BenchmarkClock::now() - start).count();
}

class AttentionBenchmarkTest : public ::testing::Test {
 protected:
  explicit AttentionBenchmarkTest(ImplementationTable table = FaultyTable())
      : registry_(table, {{&device_.device(), &device_.workspace()}}) {
    ModelSpec spec;
    spec.name = "m";
    LayerStack& stack = spec.stacks.emplace_back();
    for (const bool windowed : {false, true}) {
      LayerSpec& layer = stack.self_attention.emplace_back();
      layer.num_heads = 4;
      layer.num_kv_heads = 2;
      layer.head_dim = layer.value_dim = 16;
      layer.options.is_causal = true;
      if (windowed) layer.options.window_left = 20;
    }
    spec.dtype = DType::kFloat32;
    target_.pool = registry_.Load(spec, "").value();
    target_.layer.model = "m";
    target_.max_tokens = 1 << 20;
    target_.max_bytes = kBytes;
    shape_.batch = 2;
    shape_.q_len = 33;
    shape_.kv_len = 70;
    options_.share = 1.0;
    options_.iterations = 3;
    options_.deadline = In(60.0);
  }

  absl::StatusOr<std::vector<BenchmarkResult>> Run(std::uint64_t workspace_bytes = kBytes) {
    DirectRunner runner(device_.device(), &cancelled_);
    auto problem = BenchmarkProblem::Random(target_, shape_, runner, options_.deadline);
    if (!problem.ok()) return problem.status();
    Workspace workspace(device_.device(), workspace_bytes, workspace_bytes);
    auto results = target_.pool->BenchmarkAttentionTypes(**problem, workspace, runner, options_);
    if (results.ok()) {
      RecordTimings(*results, registry_.table(), (*problem)->shape(), registry_.timings());
    }
    return results;
  }

  BenchmarkResult RunOne(const std::string& name, std::uint64_t workspace_bytes = kBytes) {
    options_.implementations = {name};
    auto results = Run(workspace_bytes);
    EXPECT_TRUE(results.ok()) << results.status();
    return results.ok() && !results->empty() ? results->front() : BenchmarkResult();
  }

  TestDevice device_;
  ModelRegistry registry_;
  BenchmarkTarget target_;
  BenchmarkShape shape_;
  BenchmarkOptions options_;
  bool cancelled_ = false;
};

class AllImplementationsTest : public AttentionBenchmarkTest {
 protected:
  AllImplementationsTest() : AttentionBenchmarkTest(BuiltInImplementations()) {}

  void ExpectAllRight(double tolerance) {
    auto results = Run();
    ASSERT_TRUE(results.ok()) << results.status();
    EXPECT_GE(results->size(), 4u);
    for (const BenchmarkResult& result : *results) {
      SCOPED_TRACE(result.implementation);
      EXPECT_EQ(result.error, "");
      EXPECT_EQ(result.iterations, options_.iterations);
      EXPECT_GT(result.min_seconds, 0.0);
      EXPECT_LE(result.min_seconds, result.median_seconds);
      EXPECT_LE(result.median_seconds, result.p95_seconds);
      EXPECT_GT(result.flops, 0u);
      EXPECT_FALSE(result.backend.empty());
      const ImplementationRow* row = FindImplementation(registry_.table(), result.implementation);
      if (!row->traits.exact) continue;
      EXPECT_LT(result.errors.relative, tolerance);
      EXPECT_GT(result.errors.relative, 0.0);  // some rounding was seen: rows were compared
    }
  }
};

TEST_F(AllImplementationsTest, EachHasFiguresAndIsRight) {
  ExpectAllRight(1e-5);
  EXPECT_GE(registry_.timings().All().size(), 4u);
}

TEST_F(AllImplementationsTest, KeysInPagesAreTheSameProblem) {
  for (const std::uint32_t layer : {0u, 1u}) {  // with a window, which lets tokens go
    target_.layer.layer = layer;
    shape_.cached = true;
    shape_.kv_len = 300;
    ExpectAllRight(1e-5);
  }
  EXPECT_TRUE(registry_.timings().All().front().shape.paged);
}

TEST_F(AllImplementationsTest, RaggedRowsMasksAndHalfPrecision) {
  shape_.query_lengths = {33, 5};
  shape_.kv_lengths = {70, 9};
  shape_.has_mask = true;
  shape_.dtype = DType::kBFloat16;
  ExpectAllRight(3e-2);
}

TEST_F(AttentionBenchmarkTest, FaultsAreSeenAndNotRecorded) {
  options_.implementations = {"standard", "wrong", "silent", "failing", "greedy"};
  auto results = Run();
  ASSERT_TRUE(results.ok()) << results.status();
  ASSERT_EQ(results->size(), 5u);
  EXPECT_LT((*results)[0].errors.max_abs, 1e-5);
  EXPECT_NEAR((*results)[1].errors.max_abs, 0.25, 1e-4);
  EXPECT_GT((*results)[1].errors.relative, 0.05);
  EXPECT_TRUE(std::isnan((*results)[2].errors.max_abs));
  EXPECT_EQ((*results)[3].error, "INTERNAL: planted");
  EXPECT_EQ((*results)[3].iterations, 0u);
  EXPECT_NE((*results)[4].error, "");
  ASSERT_EQ(registry_.timings().All().size(), 1u);
  EXPECT_EQ(registry_.timings().All().front().implementation, "standard");
}

TEST_F(AttentionBenchmarkTest, ThePeakOfTheWorkspaceIsMeasuredAndBounded) {
  const BenchmarkResult result = RunOne("standard");
  EXPECT_EQ(result.error, "");
  EXPECT_GT(result.peak_workspace_bytes, 0u);
  const BenchmarkResult refused = RunOne("standard", result.peak_workspace_bytes - 1);
  EXPECT_NE(refused.error, "");
  EXPECT_EQ(refused.iterations, 0u);
}

TEST_F(AttentionBenchmarkTest, TensorsBeyondTheBoundAreRefusedBeforeTheyAreMade) {
  shape_.q_len = shape_.kv_len = 1 << 18;
  auto results = Run();
  EXPECT_EQ(results.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(results.status()), "BENCHMARK_BYTES");
  shape_.kv_len = 70;
  shape_.q_len = 33;
  shape_.batch = (1 << 20) + 1;
  results = Run();
  EXPECT_EQ(results.status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(AttentionBenchmarkTest, TheDeadlineEndsItWithWhatThereWasTimeFor) {
  options_.iterations = 100000;
  options_.implementations = {"slow", "flash"};
  const BenchmarkClock::time_point start = BenchmarkClock::now();
  options_.deadline = In(0.3);
  auto results = Run();
  EXPECT_LT(Seconds(start), 5.0);
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_GE((*results)[0].iterations, 1u);
  EXPECT_LT((*results)[0].iterations, 20u);
  EXPECT_GE((*results)[0].median_seconds, 0.02);
  options_.deadline = BenchmarkClock::now();  // not even for a sample
  EXPECT_TRUE(absl::IsDeadlineExceeded(Run().status()));
}

TEST_F(AttentionBenchmarkTest, CancellingEndsItBetweenExecutions) {
  options_.iterations = 100000;
  options_.implementations = {"slow"};
  int reports = 0;
  options_.progress = [&](const std::string&, double) {
    if (++reports == 3) __atomic_store_n(&cancelled_, true, __ATOMIC_RELAXED);
  };
  EXPECT_EQ(Run().status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(reports, 3);
}

TEST_F(AttentionBenchmarkTest, ProgressRisesAndNamesWhoIsNext) {
  std::vector<double> fractions;
  std::string names;
  options_.implementations = {"flash", "standard"};
  options_.progress = [&](const std::string& name, double fraction) {
    fractions.push_back(fraction);
    names += name + " ";
  };
  ASSERT_TRUE(Run().ok());
  ASSERT_EQ(fractions.size(), 8u);  // the first execution and three more of each
  EXPECT_TRUE(std::is_sorted(fractions.begin(), fractions.end()));
  EXPECT_GE(fractions.front(), 0.0);
  EXPECT_GE(fractions.back(), 7.0 / 8.0);
  EXPECT_LE(fractions.back(), 1.0);
  EXPECT_EQ(names, "flash standard flash standard standard flash flash standard ");
}

TEST_F(AttentionBenchmarkTest, TheDeviceIsLeftToOthersForTheRestOfItsTime) {
  options_.implementations = {"slow"};
  options_.iterations = 4;
  options_.share = 0.2;
  const BenchmarkClock::time_point start = BenchmarkClock::now();
  ASSERT_TRUE(Run().ok());
  // Five executions of 20 ms and more, each followed by a pause of four times as long.
  EXPECT_GE(Seconds(start), 5 * 0.02 * 5);
}

TEST_F(AttentionBenchmarkTest, WithoutANumberItRunsUntilMediansAreSteadyOrItIsOver) {
  options_.iterations = 0;
  options_.deadline = In(20.0);
  const BenchmarkResult result = RunOne("flash");
  EXPECT_GE(result.iterations, 9u);
  EXPECT_LE(result.iterations, 200u);
}

TEST_F(AttentionBenchmarkTest, WrongNamesAndShapes) {
  options_.implementations = {"no_such"};
  EXPECT_EQ(Run().status().code(), absl::StatusCode::kNotFound);
  options_.implementations.clear();
  shape_.query_lengths = {1, 2, 3};
  EXPECT_EQ(Run().status().code(), absl::StatusCode::kInvalidArgument);
  shape_.query_lengths.clear();
  shape_.q_len = 0;
  EXPECT_EQ(ErrorDetailsOf(Run().status())["field"], "shape.q_len");
}

TEST(QuantileTest, IsTheNearestRank) {
  const std::vector<double> sorted = {1, 2, 3, 4};
  EXPECT_EQ(Quantile(sorted, 0.5), 2);
  EXPECT_EQ(Quantile(sorted, 0.95), 4);
  EXPECT_EQ(Quantile(sorted, 0.0), 1);
  EXPECT_EQ(Quantile({7}, 0.5), 7);
}

}  // namespace
}  // namespace attn
