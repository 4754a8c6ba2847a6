// The choice of an implementation on hardware that is described by fakes: what is eligible, what is
// fastest, what was measured, what memory allows; and the reasons that are given.
#include "core/selector.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/gpu_hardware.h"
#include "core/peaks.h"
#include "tests/core/core_fixture.h"

namespace attn {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
constexpr std::uint64_t kGiB = std::uint64_t{1} << 30;

AttentionShape Shape(std::int64_t batch, std::int64_t q_len, std::int64_t kv_len, DType dtype) {
  AttentionShape shape;
  shape.batch = batch;
  shape.num_heads = 32;
  shape.num_kv_heads = 8;
  shape.head_dim = shape.value_dim = 128;
  shape.q_len = q_len;
  shape.kv_len = kv_len;
  shape.longest_pairs = q_len * kv_len;
  shape.pairs = batch * q_len * kv_len;
  shape.dtype = shape.kv_dtype = shape.output_dtype = dtype;
  return shape;
}

// Implementations of a GPU as a table would list them; nothing of them runs.
class FakeGpuAttention : public AttentionImplementation {
 public:
  explicit FakeGpuAttention(bool forms_scores) : forms_scores_(forms_scores) {}

  absl::Status Attend(const kernels::AttentionArgs&, const AttentionShape&,
                      ExecutionContext&) const override {
    return absl::InternalError("executed");
  }
  MemoryUsage WorkspaceBytes(const AttentionShape& shape, int) const override {
    const auto scores = static_cast<std::uint64_t>(shape.pairs * shape.num_heads) * sizeof(float);
    return {forms_scores_ ? scores : kMiB, true};
  }

 private:
  const bool forms_scores_;
};

std::unique_ptr<AttentionImplementation> MakeTiled() {
  return std::make_unique<FakeGpuAttention>(false);
}
std::unique_ptr<AttentionImplementation> MakeScores() {
  return std::make_unique<FakeGpuAttention>(true);
}

absl::Status WithoutWeights(const AttentionShape& shape) {
  return shape.stage == kernels::ScoreStage::kNone ? absl::OkStatus()
                                                   : Unsupported("does not form the weights");
}
absl::Status Everything(const AttentionShape&) { return absl::OkStatus(); }

std::vector<ImplementationRow> GpuTable() {
  Traits traits;
  traits.backends = {"cuda"};
  traits.dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  Traits host = traits;
  host.backends = {"cpu"};
  return {{"flash", traits, &WithoutWeights, &MakeTiled},
          {"memory_efficient", traits, &WithoutWeights, &MakeTiled},
          {"standard", traits, &Everything, &MakeScores},
          {"host_only", host, &Everything, &MakeTiled}};
}

GpuHardware Gpu(int major, int minor, int multiprocessors, std::uint64_t bytes) {
  return {"fake", major, minor, major >= 7, bytes, bytes, multiprocessors};
}

Selector OnGpu(const std::vector<ImplementationRow>& table, const GpuHardware& gpu) {
  SelectorOptions options;
  options.profile = &ProfileOfGpu(gpu);
  options.units = gpu.multiprocessors;
  options.available_bytes = [gpu] { return gpu.free_bytes; };
  return Selector(table, options);
}

SelectorOptions OnCpu(const char* isa) {
  SelectorOptions options;
  options.profile = &ProfileOfCpu(isa);
  options.units = 2;
  return options;
}

const Candidate& Find(const std::vector<Candidate>& candidates, const std::string& name) {
  for (const Candidate& candidate : candidates) {
    if (candidate.row->name == name) return candidate;
  }
  ADD_FAILURE() << "no candidate " << name;
  return candidates.front();
}

std::string Chosen(const Selector& selector, const AttentionShape& shape) {
  const absl::StatusOr<Selection> selection = selector.Select({}, shape);
  return selection.ok() ? selection->row->name : std::string(selection.status().message());
}

bool Contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(HardwareProfilesTest, AreFoundByClass) {
  EXPECT_STREQ(ProfileOfGpu(Gpu(6, 1, 10, 6 * kGiB)).name, "cuda/sm61");
  EXPECT_STREQ(ProfileOfGpu(Gpu(7, 0, 80, 16 * kGiB)).name, "cuda/sm70");
  GpuHardware without_tensor_cores = Gpu(7, 5, 14, 4 * kGiB);
  without_tensor_cores.tensor_cores = false;
  EXPECT_STREQ(ProfileOfGpu(without_tensor_cores).name, "cuda/sm61");
  EXPECT_STREQ(ProfileOfGpu(Gpu(8, 9, 128, 24 * kGiB)).name, "cuda/sm80");
  EXPECT_STREQ(ProfileOfGpu(Gpu(12, 0, 148, 32 * kGiB)).name, "cuda/sm90");
  EXPECT_STREQ(ProfileOfCpu("avx2").name, "cpu/avx2");
  EXPECT_STREQ(ProfileOfCpu("something new").name, "cpu/scalar");
}

TEST(HardwareProfilesTest, AreComplete) {
  for (const HardwareProfile& profile : HardwareProfiles()) {
    SCOPED_TRACE(profile.name);
    ASSERT_FALSE(profile.costs.empty());
    EXPECT_STREQ(profile.CostsOf("not heard of").name, "");
    for (const ImplementationCosts& costs : profile.costs) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8}) {
        EXPECT_GT(costs.share.Of(dtype) * profile.operations_per_cycle.Of(dtype), 0.0);
      }
      EXPECT_GT(costs.call_seconds, 0.0);
    }
  }
}

TEST(GpuHardwareTest, IsWhatTheDriverSays) {
  EXPECT_TRUE(DescribeGpus("libno_such_driver.so.1").empty());
  const std::vector<GpuHardware> gpus = DescribeGpus(ATTN_FAKE_CUDA_DRIVER);
  ASSERT_EQ(gpus.size(), 2u);
  EXPECT_EQ(gpus[0].name, "NVIDIA GeForce GTX 1060");
  EXPECT_EQ(gpus[0].major * 10 + gpus[0].minor, 61);
  EXPECT_FALSE(gpus[0].tensor_cores);
  EXPECT_EQ(gpus[0].multiprocessors, 10);
  EXPECT_EQ(gpus[0].memory_bytes, 6 * kGiB);
  EXPECT_EQ(gpus[0].free_bytes, 5 * kGiB);
  EXPECT_EQ(gpus[1].major * 10 + gpus[1].minor, 75);
  EXPECT_FALSE(gpus[1].tensor_cores) << "the GTX 16 series has none";
  EXPECT_EQ(gpus[1].free_bytes, 0u);
  EXPECT_EQ(DescribeGpus(ATTN_FAKE_CUDA_DRIVER)[0].free_bytes, 5 * kGiB);
}

TEST(PeaksTest, AreMeasured) {
  TestDevice test;
  Peaks peaks;
  test.device().executor().Run([&] { peaks = MeasurePeaks(test.device()); });
  EXPECT_GT(peaks.operations_per_second, 1e8);
  EXPECT_LT(peaks.operations_per_second, 1e15);
  EXPECT_GT(peaks.bytes_per_second, 1e8);
  EXPECT_LT(peaks.bytes_per_second, 1e14);
}

TEST(SelectorTest, WithoutTensorCoresMemoryEfficientIsTheFastest) {
  const std::vector<ImplementationRow> table = GpuTable();
  const Selector selector = OnGpu(table, Gpu(6, 1, 10, 6 * kGiB));
  const AttentionShape shape = Shape(1, 4096, 4096, DType::kFloat16);
  const Selection selection = selector.Select({}, shape).value();
  EXPECT_EQ(selection.row->name, "memory_efficient");
  EXPECT_TRUE(Contains(selection.reason, "memory_efficient: estimated")) << selection.reason;
  EXPECT_TRUE(Contains(selection.reason, "flash")) << selection.reason;
  EXPECT_TRUE(Contains(selection.reason, "host_only does not run on cuda")) << selection.reason;
  // float16 is computed as float32 there.
  const double float16 = selector.Candidates(shape, false).front().estimated_seconds;
  const double float32 =
      selector.Candidates(Shape(1, 4096, 4096, DType::kFloat32), false).front().estimated_seconds;
  EXPECT_NEAR(float16 / float32, 1.0, 0.05);
}

TEST(SelectorTest, TensorCoresMakeFlashTheFastest) {
  const std::vector<ImplementationRow> table = GpuTable();
  for (const GpuHardware& gpu : {Gpu(8, 0, 108, 40 * kGiB), Gpu(9, 0, 132, 80 * kGiB)}) {
    const Selector selector = OnGpu(table, gpu);
    const AttentionShape half = Shape(2, 8192, 8192, DType::kBFloat16);
    const std::vector<Candidate> candidates = selector.Candidates(half, false);
    EXPECT_EQ(candidates.front().row->name, "flash") << selector.profile().name;
    const double single =
        Find(selector.Candidates(Shape(2, 8192, 8192, DType::kFloat32), false), "flash")
            .estimated_seconds;
    EXPECT_GT(single, 4.0 * candidates.front().estimated_seconds) << selector.profile().name;
  }
  // A newer one is faster at the same.
  const AttentionShape shape = Shape(2, 8192, 8192, DType::kBFloat16);
  EXPECT_LT(OnGpu(table, Gpu(9, 0, 132, 80 * kGiB)).Candidates(shape, false)[0].estimated_seconds,
            OnGpu(table, Gpu(8, 0, 108, 40 * kGiB)).Candidates(shape, false)[0].estimated_seconds);
}

TEST(SelectorTest, WhatDoesNotFitIntoSixGigabytesIsNotTried) {
  const std::vector<ImplementationRow> table = GpuTable();
  const Selector selector = OnGpu(table, Gpu(6, 1, 10, 6 * kGiB));
  AttentionShape shape = Shape(4, 4096, 4096, DType::kFloat32);  // 8 GiB of scores
  const std::vector<Candidate> candidates = selector.Candidates(shape, false);
  EXPECT_EQ(candidates.front().row->name, "memory_efficient");
  const Candidate& standard = Find(candidates, "standard");
  EXPECT_FALSE(standard.eligible);
  EXPECT_TRUE(standard.lacks_memory);
  EXPECT_TRUE(Contains(standard.reason, "needs 8 GiB of scratch memory")) << standard.reason;
  shape.stage = kernels::ScoreStage::kProbabilities;  // which only standard forms
  EXPECT_EQ(ErrorReason(selector.Select({}, shape).status()), "WORKSPACE_LIMIT");
  shape = Shape(1, 4096, 4096, DType::kFloat32);
  shape.stage = kernels::ScoreStage::kProbabilities;
  EXPECT_EQ(Chosen(selector, shape), "standard");
}

TEST(SelectorTest, OnACpuWithAvx2FlashIsTakenForPrompts) {
  const Selector selector(BuiltInImplementations(), OnCpu("avx2"));
  AttentionShape shape = Shape(1, 2048, 2048, DType::kFloat32);
  shape.is_causal = true;
  const Selection selection = selector.Select({}, shape).value();
  EXPECT_EQ(selection.row->name, "flash");
  EXPECT_TRUE(Contains(selection.reason, "flash: estimated")) << selection.reason;
  EXPECT_TRUE(Contains(selection.reason, "torch_sdpa")) << selection.reason;
  EXPECT_FALSE(Contains(selection.reason, "sparse")) << selection.reason;
  shape.stage = kernels::ScoreStage::kProbabilities;
  const Selection weights = selector.Select({}, shape).value();
  EXPECT_EQ(weights.row->name, "standard");
  EXPECT_TRUE(Contains(weights.reason, "flash does not form the attention weights"))
      << weights.reason;
}

TEST(SelectorTest, ApproximateOnesOnlyWhereTheModelAllows) {
  const Selector selector(BuiltInImplementations(), OnCpu("avx2"));
  AttentionShape shape = Shape(1, 8192, 8192, DType::kBFloat16);
  shape.is_causal = true;
  shape.sparsity.factor = 0.9;
  EXPECT_EQ(Chosen(selector, shape), "flash");
  const std::vector<Candidate> candidates = selector.Candidates(shape, false);
  EXPECT_EQ(Find(candidates, "sparse").reason,
            "sparse is approximate, which the model does not allow");
  SelectionRequest allowing;
  allowing.allow_approximate = true;
  EXPECT_EQ(selector.Select(allowing, shape)->row->name, "sparse");
}

TEST(SelectorTest, With512MegabytesFreeWhatIsLargerIsRefusedBeforeItIsTried) {
  std::uint64_t free = 512 * kMiB;
  SelectorOptions options = OnCpu("avx2");
  options.available_bytes = [&free] { return free; };
  const Selector selector(BuiltInImplementations(), options);
  AttentionShape shape = Shape(1, 16384, 16384, DType::kFloat32);  // 1 GiB for a head's scores
  EXPECT_FALSE(Find(selector.Candidates(shape, false), "standard").eligible);
  EXPECT_EQ(Chosen(selector, shape), "flash");
  SelectionRequest named;
  named.named = "standard";
  EXPECT_EQ(ErrorReason(selector.Select(named, shape).status()), "WORKSPACE_LIMIT");
  SelectionRequest active;
  active.active = FindImplementation(BuiltInImplementations(), "standard");
  const Selection gave_way = selector.Select(active, shape).value();
  EXPECT_TRUE(gave_way.fell_back);
  EXPECT_TRUE(Contains(gave_way.reason, "scratch memory")) << gave_way.reason;
  shape.stage = kernels::ScoreStage::kProbabilities;
  EXPECT_EQ(selector.Select({}, shape).status().code(), absl::StatusCode::kResourceExhausted);
  // An answer that was given while there was enough does not outlive the memory.
  free = 16 * kGiB;
  EXPECT_EQ(Chosen(selector, shape), "standard");
  EXPECT_EQ(Chosen(selector, shape), "standard");
  free = 512 * kMiB;
  EXPECT_EQ(ErrorReason(selector.Select({}, shape).status()), "WORKSPACE_LIMIT");
}

TEST(SelectorTest, MemoryThatComesBackIsUsedAgain) {
  std::vector<ImplementationRow> table = GpuTable();
  std::swap(table[0], table[2]);
  table.resize(2);  // standard and memory_efficient
  MeasuredTimings timings;
  const AttentionShape shape = Shape(1, 2048, 2048, DType::kFloat32);  // 512 MiB of scores
  timings.Record({"standard", shape, 1e-3});
  timings.Record({"memory_efficient", shape, 2e-3});
  std::uint64_t free = 256 * kMiB;
  SelectorOptions options;
  options.profile = &ProfileOfGpu(Gpu(6, 1, 10, 6 * kGiB));
  options.available_bytes = [&free] { return free; };
  options.timings = &timings;
  const Selector selector(table, options);
  EXPECT_EQ(Chosen(selector, shape), "memory_efficient");
  free = kGiB;
  EXPECT_EQ(Chosen(selector, shape), "standard");
}

TEST(SelectorTest, WhatWasMeasuredGoesBeforeTheModel) {
  MeasuredTimings timings;
  SelectorOptions options = OnCpu("avx2");
  options.timings = &timings;
  const Selector selector(BuiltInImplementations(), options);
  const AttentionShape shape = Shape(1, 1024, 1024, DType::kFloat32);
  ASSERT_EQ(Chosen(selector, shape), "flash");
  timings.Record({"torch_sdpa", shape, 2e-3});
  timings.Record({"flash", shape, 9e-2});
  const Selection selection = selector.Select({}, shape).value();
  EXPECT_EQ(selection.row->name, "torch_sdpa");
  EXPECT_TRUE(Contains(selection.reason, "torch_sdpa: estimated 2 ms")) << selection.reason;
  EXPECT_TRUE(Contains(selection.reason, "flash 90 ms")) << selection.reason;
  // So near by, and less the farther away; nothing is said about another dtype.
  EXPECT_EQ(Chosen(selector, Shape(1, 900, 1100, DType::kFloat32)), "torch_sdpa");
  EXPECT_EQ(Chosen(selector, Shape(1, 1024, 1024, DType::kBFloat16)), "flash");
  timings.Record({"torch_sdpa", shape, 2e-1});
  EXPECT_EQ(Chosen(selector, shape), "flash");
}

TEST(SelectorTest, AMachineThatIsSlowForOneIsSlowForAll) {
  MeasuredTimings timings;
  SelectorOptions options = OnCpu("avx2");
  const Selector before(BuiltInImplementations(), options);
  options.timings = &timings;
  const Selector selector(BuiltInImplementations(), options);
  const AttentionShape shape = Shape(1, 1024, 1024, DType::kFloat32);
  const double expected = Find(before.Candidates(shape, false), "flash").estimated_seconds;
  timings.Record({"flash", shape, 3.0 * expected});
  EXPECT_EQ(Chosen(selector, shape), "flash");
}

TEST(SelectorTest, KeepsItsRulesForNames) {
  const Selector selector(BuiltInImplementations(), OnCpu("avx2"));
  AttentionShape shape = Shape(1, 16, 16, DType::kFloat32);
  EXPECT_EQ(selector.Select({"nothing", nullptr, false}, shape).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(selector.Select({"standard", nullptr, false}, shape)->reason, "named in the request");
  shape.has_soft_cap = true;
  EXPECT_EQ(selector.Select({"torch_sdpa", nullptr, false}, shape).status().code(),
            absl::StatusCode::kFailedPrecondition);
  const ImplementationRow* const torch = FindImplementation(BuiltInImplementations(), "torch_sdpa");
  const Selection gave_way = selector.Select({"", torch, false}, shape).value();
  EXPECT_TRUE(gave_way.fell_back);
  EXPECT_TRUE(Contains(gave_way.reason, "gave way")) << gave_way.reason;
}

TEST(SelectorTest, OneThatCantDoItIsNotChosenFromTheCache) {
  const std::vector<ImplementationRow> table = GpuTable();
  const Selector selector = OnGpu(table, Gpu(8, 0, 108, 40 * kGiB));
  AttentionShape shape = Shape(1, 512, 512, DType::kFloat16);
  EXPECT_EQ(Chosen(selector, shape), "flash");
  shape.stage = kernels::ScoreStage::kProbabilities;
  EXPECT_EQ(Chosen(selector, shape), "standard");
  shape.dtype = DType::kInt32;
  EXPECT_EQ(selector.Select({}, shape).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(SelectionKeyTest, TakesNearbyLengthsForOne) {
  const auto key = [](std::int64_t q_len, std::int64_t kv_len) {
    AttentionShape shape = Shape(1, q_len, kv_len, DType::kFloat32);
    return SelectionKeyOf(shape, false);
  };
  EXPECT_EQ(key(1, 1030), key(1, 1100));
  EXPECT_FALSE(key(1, 1030) == key(1, 1300));
  EXPECT_FALSE(key(1, 3) == key(1, 4));
  EXPECT_FALSE(key(1, 32768) == key(32768, 1));
  AttentionShape shape = Shape(1, 64, 64, DType::kFloat32);
  EXPECT_FALSE(SelectionKeyOf(shape, false) == SelectionKeyOf(shape, true));
  const SelectionKey before = SelectionKeyOf(shape, false);
  shape.rows = {{64, 64, 5}};
  EXPECT_FALSE(SelectionKeyOf(shape, false) == before);
}

TEST(SelectionCacheTest, ForgetsWhatIsOutOfDate) {
  SelectionCache cache;
  const SelectionKey key = SelectionKeyOf(Shape(1, 1, 1, DType::kFloat32), false);
  EXPECT_FALSE(cache.Find(key, 1));
  cache.Store(key, 1, {nullptr, "old", 0, 0});
  EXPECT_EQ(cache.Find(key, 1)->reason, "old");
  EXPECT_FALSE(cache.Find(key, 2));
  cache.Store(key, 2, {nullptr, "new", 0, 0});
  cache.Store(key, 1, {nullptr, "late", 0, 0});
  EXPECT_EQ(cache.Find(key, 2)->reason, "new");
}

TEST(CostModelTest, PeaksFarFromTheProfileAreCut) {
  const HardwareProfile& profile = ProfileOfCpu("avx2");
  CostModel model(profile, 1, nullptr,
                  [](const std::string&, const AttentionShape&) { return std::uint64_t{0}; });
  const AttentionShape shape = Shape(1, 4096, 4096, DType::kFloat32);
  const std::uint64_t operations = 100'000'000'000;
  const double before = model.Estimate("flash", shape, operations);
  const std::uint64_t version = model.version();
  model.SetPeaks({1.0, 1.0});
  EXPECT_NE(model.version(), version);
  EXPECT_NEAR(model.Estimate("flash", shape, operations) / before, 4.0, 0.1);
  model.SetPeaks({0.0, 0.0});  // could not be measured
  EXPECT_NEAR(model.Estimate("flash", shape, operations) / before, 4.0, 0.1);
}

}  // namespace
}  // namespace attn
