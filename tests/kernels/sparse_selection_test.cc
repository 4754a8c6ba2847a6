#include "kernels/cpu/sparse_selection.h"

#include <gtest/gtest.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention_args.h"

// The texts, once for the instruction set of this program and once for each wider one.
// clang-format off
#define ATTN_VEC_BYTES 16
namespace attn::kernels::test_scalar {
namespace {
#include "kernels/cpu/vec-inl.h"
#include "kernels/cpu/math-inl.h"
#include "kernels/cpu/page_summary-inl.h"
#include "kernels/cpu/page_weights-inl.h"
#include "kernels/cpu/sparse_selection-inl.h"
}  // namespace
}  // namespace attn::kernels::test_scalar
#undef ATTN_VEC_BYTES

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define ATTN_VEC_BYTES 32
namespace attn::kernels::test_avx2 {
namespace {
#include "kernels/cpu/vec-inl.h"
#include "kernels/cpu/math-inl.h"
#include "kernels/cpu/page_summary-inl.h"
#include "kernels/cpu/page_weights-inl.h"
#include "kernels/cpu/sparse_selection-inl.h"
}  // namespace
}  // namespace attn::kernels::test_avx2
#undef ATTN_VEC_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define ATTN_VEC_BYTES 64
namespace attn::kernels::test_avx512 {
namespace {
#include "kernels/cpu/vec-inl.h"
#include "kernels/cpu/math-inl.h"
#include "kernels/cpu/page_summary-inl.h"
#include "kernels/cpu/page_weights-inl.h"
#include "kernels/cpu/sparse_selection-inl.h"
}  // namespace
}  // namespace attn::kernels::test_avx512
#undef ATTN_VEC_BYTES
#pragma GCC pop_options
// clang-format on

namespace attn::kernels {
namespace {

using cpu::SelectionResult;
using cpu::SelectionTask;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Isa {
  const char* name;
  bool supported;
  void (*summarize)(const float*, int64_t, int64_t, float*);
  void (*bound)(const float*, int64_t, int64_t, int64_t, float*);
  SelectionResult (*select)(const SelectionTask&, int32_t*, void*);
  SelectionResult (*select_by_bounds)(const SelectionTask&, int32_t*, void*);
};

void PrintTo(const Isa& isa, std::ostream* out) { *out << isa.name; }

std::vector<Isa> RunnableIsas() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  std::vector<Isa> isas = {{"scalar", true, test_scalar::SummarizePage, test_scalar::BoundPage,
                            test_scalar::SelectPages, test_scalar::SelectPagesByBounds},
                           {"avx2", avx2, test_avx2::SummarizePage, test_avx2::BoundPage,
                            test_avx2::SelectPages, test_avx2::SelectPagesByBounds},
                           {"avx512", avx512, test_avx512::SummarizePage, test_avx512::BoundPage,
                            test_avx512::SelectPages, test_avx512::SelectPagesByBounds}};
  std::erase_if(isas, [](const Isa& isa) { return !isa.supported; });
  return isas;
}

struct Shape {
  int64_t kv_len = 640;
  int64_t head_dim = 32;
  int64_t first_row = 0;
  int64_t rows = 64;
  int64_t group = 1;
  int64_t first_position = 0;
  bool causal = true;
  int64_t window_left = -1;
};

// Queries and keys of one KV head, and what a selection over them gives.
class Problem {
 public:
  Problem(const Isa& isa, const Shape& shape, bool bounds = false)
      : isa_(isa), shape_(shape), bounds_(bounds) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    queries.resize(static_cast<std::size_t>(shape.rows * shape.head_dim));
    keys.resize(static_cast<std::size_t>(shape.kv_len * shape.head_dim));
    for (float& q : queries) q = normal(random);
    for (float& k : keys) k = normal(random);
    for (int64_t i = 0; i < shape.rows; ++i) {
      const int64_t p = Position(i);
      KeyRange range = {0, shape.kv_len};
      if (shape.causal) range.end = std::min(range.end, p + 1);
      if (shape.window_left >= 0) range.begin = std::max<int64_t>(0, p - shape.window_left);
      if (range.end <= range.begin) range = {};
      ranges.push_back(range);
    }
    task.query_stride = shape.head_dim;
    task.first_row = shape.first_row;
    task.rows = shape.rows;
    task.group = shape.group;
    task.first_position = shape.first_position;
    task.head_dim = shape.head_dim;
    task.kv_len = shape.kv_len;
    task.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
    task.local_keys = 0;
    task.factor = 0.5;
  }

  int64_t Position(int64_t row) const {
    return shape_.first_position + (shape_.first_row + row) / shape_.group;
  }
  int64_t num_pages() const { return (shape_.kv_len + kPageTokens - 1) / kPageTokens; }
  float* Key(int64_t token) { return &keys[static_cast<std::size_t>(token * shape_.head_dim)]; }
  float* Query(int64_t row) { return &queries[static_cast<std::size_t>(row * shape_.head_dim)]; }

  int64_t PairsOf(int64_t page) const {
    int64_t pairs = 0;
    for (const KeyRange& range : ranges) {
      pairs += std::max<int64_t>(0, std::min(range.end, (page + 1) * kPageTokens) -
                                        std::max(range.begin, page * kPageTokens));
    }
    return pairs;
  }

  // In a scratch that is NaN and guarded behind. What always has to hold is checked here.
  SelectionResult Select() {
    MakeSummaries();
    task.queries = queries.data();
    task.ranges = ranges.data();
    task.summaries = summaries_.data();
    const KeyRange selectable = cpu::SelectablePages(task);
    const int64_t bytes = cpu::SelectionScratchBytes(shape_.rows, shape_.group, shape_.head_dim,
                                                     selectable.end - selectable.begin);
    const std::size_t room = static_cast<std::size_t>(bytes + 127) / 64 * 64;
    const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, room),
                                                              &std::free);
    auto* const memory = static_cast<uint8_t*>(scratch.get());
    std::fill_n(memory, room, uint8_t{0xff});
    pages.assign(static_cast<std::size_t>(selectable.end - selectable.begin), -1);
    const SelectionResult result = bounds_ ? isa_.select_by_bounds(task, pages.data(), memory)
                                           : isa_.select(task, pages.data(), memory);
    for (std::size_t i = static_cast<std::size_t>(bytes); i < room; ++i) EXPECT_EQ(memory[i], 0xff);
    EXPECT_LE(result.pages, static_cast<int64_t>(pages.size()));
    pages.resize(static_cast<std::size_t>(result.pages));
    EXPECT_TRUE(std::is_sorted(pages.begin(), pages.end(), std::less_equal<>()));
    int64_t kept = 0;
    for (const int32_t page : pages) {
      EXPECT_GT(PairsOf(page), 0) << page;
      kept += PairsOf(page);
    }
    int64_t visible = 0;
    for (int64_t p = 0; p < num_pages(); ++p) visible += PairsOf(p);
    EXPECT_EQ(result.kept_pairs, kept);
    EXPECT_EQ(result.visible_pairs, visible);
    EXPECT_GE(result.estimated_mass, 0.0f);
    EXPECT_LE(result.estimated_mass, 1.0f);
    return result;
  }

  bool Has(int64_t page) const { return std::ranges::count(pages, page) == 1; }

  // A page's mean share of the attention, in double precision.
  std::vector<double> TrueMass() {
    std::vector<double> mass(static_cast<std::size_t>(num_pages()));
    for (int64_t i = 0; i < shape_.rows; ++i) {
      std::vector<double> weights;
      double total = 0;
      const KeyRange& range = ranges[static_cast<std::size_t>(i)];
      for (int64_t j = range.begin; j < range.end; ++j) {
        double dot = 0;
        for (int64_t d = 0; d < shape_.head_dim; ++d) {
          dot += static_cast<double>(Query(i)[d]) * static_cast<double>(Key(j)[d]);
        }
        weights.push_back(std::exp(dot * static_cast<double>(task.scale)));
        total += weights.back();
      }
      for (int64_t j = range.begin; j < range.end; ++j) {
        mass[static_cast<std::size_t>(j / kPageTokens)] +=
            weights[static_cast<std::size_t>(j - range.begin)] / total /
            static_cast<double>(shape_.rows);
      }
    }
    return mass;
  }

  // Adds a direction to all queries and, by `strengths`, to the keys of each page.
  void Prefer(const std::vector<float>& strengths) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    for (int64_t d = 0; d < shape_.head_dim; ++d) {
      const float direction = normal(random);
      for (int64_t i = 0; i < shape_.rows; ++i) Query(i)[d] += direction;
      for (int64_t j = 0; j < shape_.kv_len; ++j) {
        Key(j)[d] += direction * strengths[static_cast<std::size_t>(j / kPageTokens)];
      }
    }
  }

  SelectionTask task;
  std::vector<float> queries;
  std::vector<float> keys;
  std::vector<KeyRange> ranges;
  std::vector<int32_t> pages;

 private:
  void MakeSummaries() {
    task.summary_stride =
        bounds_ ? cpu::BoundFloats(shape_.head_dim) : cpu::SummaryFloats(shape_.head_dim);
    summaries_.assign(static_cast<std::size_t>(num_pages() * task.summary_stride), kNaN);
    for (int64_t p = 0; p < num_pages(); ++p) {
      std::vector<float> page(static_cast<std::size_t>(shape_.head_dim * kPageTokens), kNaN);
      const int64_t count = std::min(kPageTokens, shape_.kv_len - p * kPageTokens);
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t d = 0; d < shape_.head_dim; ++d) {
          page[static_cast<std::size_t>(d * kPageTokens + t)] = Key(p * kPageTokens + t)[d];
        }
      }
      float* const summary = &summaries_[static_cast<std::size_t>(p * task.summary_stride)];
      if (bounds_) {
        isa_.bound(page.data(), shape_.head_dim, 0, count / 2, summary);
        isa_.bound(page.data(), shape_.head_dim, count / 2, count, summary);
      } else {
        isa_.summarize(page.data(), shape_.head_dim, count, summary);
      }
    }
  }

  const Isa& isa_;
  const Shape shape_;
  const bool bounds_;
  std::vector<float> summaries_;
};

class SparseSelectionTest : public testing::TestWithParam<Isa> {};

TEST_P(SparseSelectionTest, BudgetIsMetAsNearlyAsWholePagesAllow) {
  for (const Shape& shape :
       {Shape{.kv_len = 4000, .rows = 128, .first_position = 3800},
        Shape{.kv_len = 4000, .first_row = 3, .rows = 96, .group = 5, .first_position = 3000},
        Shape{.kv_len = 2111, .head_dim = 5, .rows = 192, .causal = false},
        Shape{
            .kv_len = 4000, .rows = 33, .group = 8, .first_position = 3990, .window_left = 2500}}) {
    for (const bool bounds : {false, true}) {
      for (const double factor : {0.3, 0.5, 0.75, 0.9}) {
        Problem problem(GetParam(), shape, bounds);
        problem.task.factor = factor;
        const SelectionResult result = problem.Select();
        const double kept =
            static_cast<double>(result.kept_pairs) / static_cast<double>(result.visible_pairs);
        const double half_page =
            32.0 * static_cast<double>(shape.rows) / static_cast<double>(result.visible_pairs);
        EXPECT_NEAR(kept, 1 - factor, half_page) << shape.kv_len << " " << factor;
      }
    }
  }
}

TEST_P(SparseSelectionTest, SinkDiagonalAndNeighbourhoodAreKept) {
  Problem problem(GetParam(), {.kv_len = 1280, .rows = 64, .first_position = 1000});
  problem.task.factor = 1.0;
  problem.Select();
  EXPECT_EQ(problem.pages, (std::vector<int32_t>{0, 15, 16}));
  problem.task.local_keys = 41;  // key 959, the last of page 14, is 41 before position 1000
  problem.Select();
  EXPECT_EQ(problem.pages, (std::vector<int32_t>{0, 14, 15, 16}));
  problem.task.local_keys = 40;
  problem.task.sink_pages = 2;
  problem.Select();
  EXPECT_EQ(problem.pages, (std::vector<int32_t>{0, 1, 15, 16}));
}

TEST_P(SparseSelectionTest, PagesOutsideAllWindowsAreNotSelected) {
  Problem problem(GetParam(),
                  {.kv_len = 1280, .rows = 10, .first_position = 1000, .window_left = 200});
  for (const double factor : {0.0, 0.5, 1.0}) {
    problem.task.factor = factor;
    problem.Select();
    EXPECT_FALSE(problem.Has(0));
    EXPECT_TRUE(problem.Has(15));
    if (factor == 0.0) {
      EXPECT_EQ(problem.pages, (std::vector<int32_t>{12, 13, 14, 15}));
    }
  }
}

TEST_P(SparseSelectionTest, FactorZeroAndMassOneKeepWhatIsVisible) {
  Problem problem(GetParam(), {.kv_len = 700, .rows = 30, .group = 4, .first_position = 400});
  problem.task.factor = 0.0;
  const SelectionResult result = problem.Select();
  EXPECT_EQ(problem.pages, (std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(result.kept_pairs, result.visible_pairs);
  EXPECT_EQ(result.estimated_mass, 1.0f);
  problem.task.mass = 1.0;
  problem.task.factor = 0.9;
  EXPECT_EQ(problem.Select().pages, 7);
}

TEST_P(SparseSelectionTest, RowsThatSeeNothing) {
  Problem blind(GetParam(), {.kv_len = 128, .rows = 20, .first_position = -50});
  const SelectionResult result = blind.Select();
  EXPECT_EQ(result.pages, 0);
  EXPECT_EQ(result.visible_pairs, 0);
  EXPECT_EQ(result.estimated_mass, 1.0f);
  Problem some(GetParam(), {.kv_len = 128, .rows = 90, .first_position = -20});
  EXPECT_TRUE(some.Select().pages >= 1);
  Problem none(GetParam(), {.kv_len = 0, .rows = 5});
  EXPECT_EQ(none.Select().pages, 0);
}

// Where pages differ clearly, the order is that of the true mass, and the estimate comes near it.
TEST_P(SparseSelectionTest, RanksAsDoublePrecisionDoes) {
  for (const bool bounds : {false, true}) {
    for (const int64_t group : {1, 4}) {
      Problem problem(GetParam(),
                      {.kv_len = 1930, .head_dim = 40, .rows = 48, .group = group, .causal = false},
                      bounds);
      std::vector<float> strengths;
      for (int64_t p = 0; p < problem.num_pages(); ++p) {
        strengths.push_back(0.1f * static_cast<float>(p * 7 % problem.num_pages()));
      }
      problem.Prefer(strengths);
      problem.task.sink_pages = 0;
      problem.task.local_keys = -1000000;
      problem.task.factor = 0.8;
      const SelectionResult result = problem.Select();
      const std::vector<double> mass = problem.TrueMass();
      double least_kept = 1;
      double most_dropped = 0;
      double kept = 0;
      for (int64_t p = 0; p < problem.num_pages(); ++p) {
        const double m = mass[static_cast<std::size_t>(p)];
        if (problem.Has(p)) {
          least_kept = std::min(least_kept, m);
          kept += m;
        } else {
          most_dropped = std::max(most_dropped, m);
        }
      }
      EXPECT_GE(least_kept, 0.9 * most_dropped) << bounds << group;
      if (!bounds) {
        EXPECT_NEAR(static_cast<double>(result.estimated_mass), kept, 0.03);
      }
    }
  }
}

TEST_P(SparseSelectionTest, OneKeyThatMattersIsFound) {
  Problem problem(GetParam(), {.kv_len = 2048, .rows = 16, .first_position = 2032});
  for (int64_t d = 0; d < 32; ++d) {
    for (int64_t i = 0; i < 16; ++i) problem.Query(i)[d] += 1.0f;
    problem.Key(777)[d] += 2.5f;
  }
  problem.task.mass = 0.5;
  problem.Select();
  EXPECT_TRUE(problem.Has(777 / 64));
  EXPECT_LE(problem.pages.size(), 4u);
}

TEST_P(SparseSelectionTest, MassIsReachedWithNoMorePagesThanNeeded) {
  Problem problem(GetParam(), {.kv_len = 2048, .rows = 64, .first_position = 1984});
  float before = 0;
  for (const double mass : {0.2, 0.5, 0.9}) {
    problem.task.mass = mass;
    const SelectionResult result = problem.Select();
    EXPECT_GE(result.estimated_mass, static_cast<float>(mass));
    EXPECT_LE(result.estimated_mass, static_cast<float>(mass) + 0.1f);
    EXPECT_GT(result.estimated_mass, before);
    before = result.estimated_mass;
  }
}

// On noise no page is better than another: the estimate says so.
TEST_P(SparseSelectionTest, NoiseHasNoMassToFind) {
  Problem problem(GetParam(),
                  {.kv_len = 6400, .head_dim = 64, .rows = 128, .first_position = 6272});
  problem.task.factor = 0.9;
  EXPECT_NEAR(problem.Select().estimated_mass, 0.1f, 0.03f);
}

TEST_P(SparseSelectionTest, KeysThatAreNotFiniteAreKept) {
  for (const bool bounds : {false, true}) {
    for (const float bad : {kNaN, kInf, -kInf, 1e38f}) {
      Problem problem(GetParam(), {.kv_len = 1280, .rows = 32, .first_position = 1248}, bounds);
      problem.Key(5 * 64 + 9)[3] = bad;
      problem.task.factor = 1.0;
      problem.Select();
      if (bounds && std::isfinite(bad)) continue;
      EXPECT_TRUE(problem.Has(5)) << bad << bounds;
      EXPECT_EQ(problem.pages.size(), 3u) << bad << bounds;
    }
  }
}

TEST_P(SparseSelectionTest, QueriesThatAreNotFiniteSpoilNothing) {
  for (const float bad : {kNaN, kInf, 3e38f}) {
    Problem problem(GetParam(), {.kv_len = 1280, .rows = 32, .first_position = 1248});
    for (int64_t d = 0; d < 32; ++d) problem.Query(7)[d] = bad;
    problem.task.factor = 0.5;
    const SelectionResult result = problem.Select();
    if (!std::isfinite(bad)) {
      EXPECT_NEAR(static_cast<double>(result.kept_pairs),
                  0.5 * static_cast<double>(result.visible_pairs), 32.0 * 32.0);
    }
    problem.queries.assign(problem.queries.size(), bad);
    problem.Select();
  }
}

TEST_P(SparseSelectionTest, AlibiPrefersTheNeighbourhoodAndSoftCapFlattens) {
  Problem problem(GetParam(), {.kv_len = 2048, .rows = 32, .first_position = 2016});
  problem.Prefer({2.0f, 2.0f, 2.0f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                  0,    0,    0,    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
  problem.task.factor = 0.88;
  const SelectionResult plain = problem.Select();
  EXPECT_TRUE(problem.Has(1) && problem.Has(2));
  problem.task.soft_cap = 0.5f;
  EXPECT_LT(problem.Select().estimated_mass, plain.estimated_mass);
  problem.task.soft_cap = 0.0f;
  const float slope = 0.1f;
  problem.task.alibi_slopes = &slope;
  problem.Select();
  EXPECT_EQ(problem.pages, (std::vector<int32_t>{0, 29, 30, 31}));
}

INSTANTIATE_TEST_SUITE_P(Isas, SparseSelectionTest, testing::ValuesIn(RunnableIsas()),
                         [](const testing::TestParamInfo<Isa>& test) {
                           return std::string(test.param.name);
                         });

}  // namespace
}  // namespace attn::kernels
