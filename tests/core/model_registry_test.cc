// Specs, pools, the choice of an implementation, and models by name.
#include "core/model_registry.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/factory.h"
#include "core/selector.h"
#include "tests/core/core_fixture.h"

namespace attn {
namespace {

ModelSpec SpecOf(const std::string& name) {
  ModelSpec spec;
  spec.name = name;
  LayerStack& stack = spec.stacks.emplace_back();
  LayerSpec& layer = stack.self_attention.emplace_back();
  layer.repeat = 3;
  layer.num_heads = 8;
  layer.num_kv_heads = 2;
  layer.head_dim = 16;
  return spec;
}

class ModelRegistryTest : public testing::Test {
 protected:
  absl::StatusCode LoadCode(const ModelSpec& spec) {
    return registry_.Load(spec, "").status().code();
  }

  TestDevice test_;
  ModelRegistry registry_{BuiltInImplementations(), {{&test_.device(), &test_.workspace()}}};
};

TEST_F(ModelRegistryTest, CompletesASpecAndFindsItsLayers) {
  const auto pool = registry_.Load(SpecOf("m"), "");
  ASSERT_TRUE(pool.ok()) << pool.status();
  const HostedModel& model = *(*pool)->model();
  EXPECT_EQ(model.Layers().size(), 3u);
  EXPECT_EQ(model.Find({"m", "", 2, AttentionKind::kSelf}).value()->spec->value_dim, 16u);
  EXPECT_EQ(model.Find({"m", "", 3, AttentionKind::kSelf}).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(model.Find({"m", "encoder", 0, AttentionKind::kSelf}).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(model.Find({"m", "", 0, AttentionKind::kCross}).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(ModelRegistryTest, RefusesSpecsThatCanNotBe) {
  ModelSpec spec = SpecOf("");
  EXPECT_EQ(LoadCode(spec), absl::StatusCode::kInvalidArgument);
  spec = SpecOf("a name with spaces");
  EXPECT_EQ(LoadCode(spec), absl::StatusCode::kInvalidArgument);
  spec = SpecOf("m");
  spec.stacks.clear();
  EXPECT_EQ(LoadCode(spec), absl::StatusCode::kInvalidArgument);
  spec = SpecOf("m");
  spec.stacks[0].self_attention[0].num_kv_heads = 3;
  EXPECT_EQ(LoadCode(spec), absl::StatusCode::kInvalidArgument);
  spec = SpecOf("m");
  spec.stacks[0].self_attention[0].repeat = 1u << 31;
  EXPECT_EQ(LoadCode(spec), absl::StatusCode::kInvalidArgument);
  spec = SpecOf("m");
  spec.stacks[0].self_attention[0].rotary.emplace().short_factor.resize(17);
  EXPECT_EQ(LoadCode(spec), absl::StatusCode::kInvalidArgument);
  spec = SpecOf("m");
  spec.instances = 2;
  EXPECT_EQ(LoadCode(spec), absl::StatusCode::kInvalidArgument);
  spec = SpecOf("m");
  spec.implementation = "nothing";
  EXPECT_EQ(LoadCode(spec), absl::StatusCode::kNotFound);
  spec = SpecOf("m");
  spec.implementation = "torch_sdpa";
  spec.stacks[0].self_attention[0].options.soft_cap = 50.0;
  EXPECT_EQ(LoadCode(spec), absl::StatusCode::kFailedPrecondition);
  spec = SpecOf("m");
  spec.cache_dtype = DType::kInt64;
  EXPECT_EQ(LoadCode(spec), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(registry_.List().empty());
  EXPECT_EQ(LoadCode(SpecOf("m")), absl::StatusCode::kOk);  // none of the failures kept the name
  EXPECT_EQ(LoadCode(SpecOf("m")), absl::StatusCode::kAlreadyExists);
}

TEST_F(ModelRegistryTest, APoolKeepsItsSnapshotOverASwitch) {
  const std::shared_ptr<ManagerPool> pool = registry_.Load(SpecOf("m"), "").value();
  const std::shared_ptr<const Active> before = pool->active();
  EXPECT_EQ(before->name(), "auto");
  const SwitchOutcome outcome = pool->SwitchAttention("standard").value();
  EXPECT_TRUE(outcome.switched);
  EXPECT_EQ(outcome.previous, "auto");
  EXPECT_EQ(pool->active()->name(), "standard");
  EXPECT_EQ(before->name(), "auto");
  EXPECT_TRUE(pool->SwitchAttention("standard")->switched);
  EXPECT_EQ(pool->switches(), 1u);  // the second one changed nothing
  EXPECT_EQ(pool->SwitchAttention("nothing").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ModelRegistryTest, ALoadedPoolOutlivesItsUnloading) {
  const std::shared_ptr<ManagerPool> pool = registry_.Load(SpecOf("m"), "").value();
  ASSERT_TRUE(registry_.Unload("m").ok());
  EXPECT_EQ(registry_.Find("m").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(registry_.Unload("m").code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(pool->model()->Layers().size(), 3u);
}

TEST_F(ModelRegistryTest, AModuleNeedsWeights) {
  EXPECT_EQ(CreateAttentionModule(SpecOf("m"), LayerRef(), FactoryOptions()).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

// A table of its own, to see the rules without the built-in rows.
absl::Status Never(const AttentionShape&) { return Unsupported("never can"); }
absl::Status Always(const AttentionShape&) { return absl::OkStatus(); }

TEST(SelectorTest, TakesTheFirstExactRowThatCan) {
  Traits approximate;
  approximate.exact = false;
  const std::vector<ImplementationRow> table = {{"rough", approximate, &Always, nullptr},
                                                {"never", Traits(), &Never, nullptr},
                                                {"always", Traits(), &Always, nullptr}};
  const AttentionShape shape;
  EXPECT_EQ(SelectImplementation(table, {}, shape)->row->name, "always");
  EXPECT_EQ(SelectImplementation(table, {"", nullptr, true}, shape)->row->name, "rough");
  EXPECT_EQ(SelectImplementation(table, {"auto", &table[1], false}, shape)->row->name, "always");
  EXPECT_EQ(SelectImplementation(table, {"never", nullptr, false}, shape).status().code(),
            absl::StatusCode::kFailedPrecondition);
  const auto gave_way = SelectImplementation(table, {"", &table[1], false}, shape);
  EXPECT_EQ(gave_way->row->name, "always");
  EXPECT_TRUE(gave_way->fell_back);
  EXPECT_EQ(SelectImplementation({table.data() + 1, 1}, {}, shape).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(ErrorTest, CarriesReasonDetailsAndDelay) {
  absl::Status status = MakeError(absl::StatusCode::kAborted, "REASON", "text", {{"length", "7"}});
  SetRetryDelay(status, 0.25);
  EXPECT_EQ(ErrorReason(status), "REASON");
  EXPECT_EQ(ErrorDetailsOf(status)["length"], "7");
  EXPECT_DOUBLE_EQ(RetryDelay(status), 0.25);
  EXPECT_EQ(ErrorReason(absl::InternalError("x")), "");
}

}  // namespace
}  // namespace attn
