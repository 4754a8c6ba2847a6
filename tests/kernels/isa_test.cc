#include "kernels/cpu/isa.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

namespace attn::kernels::cpu {
namespace {

TEST(Isa, LastRowRunsEverywhere) {
  const IsaTable table = CompiledIsas();
  ASSERT_GT(table.size, 0);
  EXPECT_TRUE(table.rows[table.size - 1].supported());
}

TEST(Isa, BestSupportedIsChosen) {
  const IsaTable table = CompiledIsas();
  for (const char* none : {static_cast<const char*>(nullptr), ""}) {
    const IsaChoice choice = ChooseIsa(none);
    EXPECT_EQ(choice.error, nullptr);
    for (const IsaKernels* row = table.rows; row != choice.row; ++row) {
      EXPECT_FALSE(row->supported()) << row->name;
    }
  }
}

TEST(Isa, ForcedIsObeyedOrRefused) {
  const IsaTable table = CompiledIsas();
  for (int64_t i = 0; i < table.size; ++i) {
    const IsaKernels& row = table.rows[i];
    const IsaChoice choice = ChooseIsa(row.name);
    if (row.supported()) {
      EXPECT_EQ(choice.row, &row);
      EXPECT_EQ(choice.error, nullptr);
    } else {
      EXPECT_TRUE(choice.row->supported()) << row.name;
      EXPECT_NE(choice.error, nullptr) << row.name;
    }
  }
}

TEST(Isa, UnknownNameIsRefused) {
  for (const char* name : {"neon", "AVX2", "avx", "avx512 "}) {
    const IsaChoice choice = ChooseIsa(name);
    EXPECT_NE(choice.error, nullptr) << name;
    EXPECT_TRUE(choice.row->supported()) << name;
  }
}

TEST(Isa, ActiveFollowsTheEnvironment) {
  const IsaChoice choice = ChooseIsa(std::getenv("ATTN_FORCE_ISA"));
  EXPECT_EQ(&ActiveIsa(), choice.row);
  EXPECT_EQ(ForcedIsaError(), choice.error);
}

}  // namespace
}  // namespace attn::kernels::cpu
