#include "client/cpp/table.h"

#include <gtest/gtest.h>

namespace attn::client {
namespace {

TEST(TableTest, ColumnsAreAlignedByCharactersNotBytes) {
  Table table({"NAME", "TIME", "WHY"});
  table.AddRow({"flash", "12.3 µs", "fastest"});
  table.AddRow({"standard", "4.00 ms"});
  EXPECT_EQ(table.Render(),
            "NAME      TIME     WHY\n"
            "flash     12.3 µs  fastest\n"
            "standard  4.00 ms\n");
}

TEST(TableTest, ControlCharactersOfAServerDoNotReachTheTerminal) {
  Table table({});
  table.AddRow({"a\x1b[2Jb\nc", "d"});
  EXPECT_EQ(table.Render(), "a?[2Jb?c  d\n");
}

TEST(UnitsTest, Bytes) {
  EXPECT_EQ(BytesText(0), "0 B");
  EXPECT_EQ(BytesText(1023), "1023 B");
  EXPECT_EQ(BytesText(1536), "1.50 KiB");
  EXPECT_EQ(BytesText(64u << 20), "64.0 MiB");
  EXPECT_EQ(BytesText((1u << 20) - 1), "1.00 MiB");
  EXPECT_EQ(BytesText(UINT64_MAX), "16777216 TiB");
}

TEST(UnitsTest, Seconds) {
  EXPECT_EQ(SecondsText(0), "0 s");
  EXPECT_EQ(SecondsText(12.34e-6), "12.3 µs");
  EXPECT_EQ(SecondsText(0.9996e-3), "1.00 ms");
  EXPECT_EQ(SecondsText(1.5), "1.50 s");
  EXPECT_EQ(SecondsText(125), "2 min 5 s");
  EXPECT_EQ(SecondsText(7260), "2 h 1 min");
}

TEST(UnitsTest, Counts) {
  EXPECT_EQ(CountText(17), "17");
  EXPECT_EQ(CountText(1.234e9), "1.23 G");
}

}  // namespace
}  // namespace attn::client
