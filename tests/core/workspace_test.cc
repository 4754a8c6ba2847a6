#include "core/workspace.h"

#include <gtest/gtest.h>

#include <cstdint>

#include "core/error.h"
#include "tests/core/core_fixture.h"

namespace attn {
namespace {

TEST(WorkspaceTest, HandsOutAlignedBlocksAndCountsThem) {
  TestDevice test;
  Workspace workspace(test.device(), 1 << 20, 1 << 20);
  void* const a = workspace.Take(100).value();
  void* const b = workspace.Take(5000).value();
  EXPECT_NE(a, b);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a) % 64, 0u);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b) % 64, 0u);
  EXPECT_EQ(workspace.meter().peak(), 5100u);
  workspace.Reset();
  EXPECT_EQ(workspace.meter().peak(), 0u);
  EXPECT_EQ(workspace.Take(0).value(), nullptr);
}

TEST(WorkspaceTest, KeepsBlocksForTheNextExecution) {
  TestDevice test;
  Workspace workspace(test.device(), 1 << 20, 1 << 20);
  void* const first = workspace.Take(4096).value();
  workspace.Reset();
  EXPECT_EQ(workspace.Take(4000).value(), first);
  EXPECT_NE(workspace.Take(4000).value(), first);
}

TEST(WorkspaceTest, RefusesWhatIsBeyondTheLimitAndGoesOn) {
  TestDevice test;
  Workspace workspace(test.device(), 10000, 0);
  ASSERT_TRUE(workspace.Take(6000).ok());
  const absl::Status status = workspace.Take(6000).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(status), "WORKSPACE_LIMIT");
  EXPECT_EQ(workspace.Take(SIZE_MAX).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(workspace.Take(4000).ok());
  workspace.Reset();
  EXPECT_TRUE(workspace.Take(10000).ok());
}

}  // namespace
}  // namespace attn
