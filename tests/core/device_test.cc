#include "core/device.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>

#include "core/error.h"
#include "core/hardware.h"
#include "tests/core/core_fixture.h"

namespace attn {
namespace {

TEST(DeviceTest, AllocatesAlignedMemoryAndMovesBytes) {
  TestDevice test;
  Device& device = test.device();
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{100}, std::size_t{3} << 20}) {
    const Buffer from = device.Allocate(bytes).value();
    const Buffer to = device.Allocate(bytes).value();
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(from.data.get()) % 64, 0u);
    device.Fill(from.data.get(), 7, bytes);
    device.Copy(to.data.get(), from.data.get(), bytes);
    device.Synchronize();
    EXPECT_EQ(static_cast<const unsigned char*>(to.data.get())[bytes - 1], 7);
  }
  EXPECT_EQ(device.Allocate(0)->data, nullptr);
  device.Copy(nullptr, nullptr, 0);
}

TEST(DeviceTest, MemoryThatIsNotThereIsAStatus) {
  TestDevice test;
  for (const std::size_t bytes : {SIZE_MAX, SIZE_MAX / 2}) {
    const absl::Status status = test.device().Allocate(bytes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(ErrorReason(status), "OUT_OF_MEMORY");
  }
}

TEST(DeviceTest, IsNamedByWhatItsKernelsRunOn) {
  TestDevice test;
  EXPECT_EQ(test.device().name(), "cpu:0");
  EXPECT_EQ(test.device().backend(), "cpu/" + DescribeCpu().active);
}

TEST(HardwareTest, DescribesWhatThisProcessMayUse) {
  const CpuHardware cpu = DescribeCpu();
  EXPECT_GE(cpu.cores, 1);
  EXPECT_GT(cpu.memory_bytes, cpu.available_bytes / 2);
  EXPECT_GT(cpu.available_bytes, 0u);
  ASSERT_FALSE(cpu.features.empty());
  EXPECT_EQ(cpu.features.back(), "scalar");
}

}  // namespace
}  // namespace attn
