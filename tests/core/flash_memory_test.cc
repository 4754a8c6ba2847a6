// What flash says that it needs is what it takes, byte for byte, and no more with longer sequences.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "core/attention_implementation.h"
#include "core/device.h"
#include "kernels/page_layout.h"
#include "tests/core/core_fixture.h"

namespace attn {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::Sequence;

// Sequences of zeros: all keys and values are one row, or one page.
class Zeros {
 public:
  struct Lengths {
    std::int64_t q_len;
    std::int64_t kv_len;
  };
  Zeros(std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
        const std::vector<Lengths>& lengths, bool paged)
      : row_(static_cast<std::size_t>(heads * head_dim)) {
    args_.num_heads = heads;
    args_.num_kv_heads = kv_heads;
    args_.head_dim = args_.value_dim = head_dim;
    args_.dtype = args_.kv_dtype = args_.output_dtype = ElementType::kBFloat16;
    args_.is_causal = true;
    args_.paged = paged;
    const kernels::PageLayout layout = {args_.kv_dtype, head_dim, head_dim};
    page_.reset(std::aligned_alloc(64, static_cast<std::size_t>(layout.page_bytes())));
    std::memset(page_.get(), 0, static_cast<std::size_t>(layout.page_bytes()));
    outputs_.reserve(lengths.size());
    spans_.reserve(lengths.size());
    blocks_.reserve(lengths.size());
    for (const Lengths& length : lengths) {
      Sequence& sequence = sequences_.emplace_back();
      sequence.q_len = length.q_len;
      sequence.kv_len = length.kv_len;
      sequence.first_query_position = length.kv_len - length.q_len;
      sequence.query = {row_.data(), 0, head_dim};
      outputs_.emplace_back(static_cast<std::size_t>(length.q_len * heads * head_dim));
      sequence.output = {outputs_.back().data(), heads * head_dim, head_dim};
      const kernels::RowsView zeros = {row_.data(), 0, 0};
      spans_.push_back({zeros, zeros, length.kv_len});
      blocks_.emplace_back(static_cast<std::size_t>((length.kv_len + 63) / 64), page_.get());
      if (paged) {
        sequence.pages.blocks = blocks_.back().data();
      } else {
        sequence.spans = &spans_.back();
        sequence.num_spans = 1;
      }
    }
    args_.sequences = sequences_.data();
    args_.num_sequences = static_cast<std::int64_t>(sequences_.size());
  }
  const AttentionArgs& args() const { return args_; }

 private:
  std::vector<std::uint16_t> row_;
  std::unique_ptr<void, decltype(&std::free)> page_{nullptr, &std::free};
  std::vector<std::vector<std::uint16_t>> outputs_;
  std::vector<kernels::KeyValueSpan> spans_;
  std::vector<std::vector<const void*>> blocks_;
  std::vector<Sequence> sequences_;
  AttentionArgs args_;
};

// Runs the problem with `threads` threads; the most that its workspace held.
std::size_t PeakOf(const AttentionArgs& args, int threads) {
  const ImplementationRow& row = *FindImplementation(BuiltInImplementations(), "flash");
  const std::unique_ptr<AttentionImplementation> flash = row.create();
  const AttentionShape shape = ShapeOf(args);
  TestDevice test(threads);
  std::size_t peak = 0;
  test.Execute([&](ExecutionContext& context) {
    const absl::Status status = flash->Attend(args, shape, context);
    EXPECT_TRUE(status.ok()) << status;
    peak = context.workspace.meter().peak();
  });
  const MemoryUsage usage = flash->WorkspaceBytes(shape, threads);
  EXPECT_TRUE(usage.exact);
  EXPECT_EQ(peak, usage.bytes) << threads << " threads";
  return peak;
}

TEST(FlashMemoryTest, TakesWhatItSays) {
  const std::vector<std::vector<Zeros::Lengths>> batches = {
      {{1, 1}},
      {{1, 9000}},
      {{0, 10}, {5, 0}, {0, 0}},
      {{300, 300}},
      {{1, 5000}, {40, 40}, {0, 3000}, {7, 6000}, {200, 2100}},
      std::vector<Zeros::Lengths>(16, {1, 2048}),
  };
  for (const std::vector<Zeros::Lengths>& lengths : batches) {
    for (const bool paged : {false, true}) {
      for (const int threads : {1, 2, 3, 8}) {
        const Zeros grouped(8, 2, 32, lengths, paged);
        PeakOf(grouped.args(), threads);
        const Zeros single(3, 3, 20, lengths, paged);
        PeakOf(single.args(), threads);
      }
    }
  }
}

TEST(FlashMemoryTest, LongSequencesFitTwoMebibytesAThread) {
  for (const bool paged : {false, true}) {
    for (const int threads : {1, 2}) {
      const auto most = static_cast<std::size_t>(threads) << 21;
      const Zeros decode(32, 8, 128, {{1, 65536}}, paged);
      EXPECT_LE(PeakOf(decode.args(), threads), most);
      const Zeros prefill(8, 8, 128, {{1500, 1500}}, paged);
      EXPECT_LE(PeakOf(prefill.args(), threads), most);
      // Longer ones are planned alone.
      for (const std::int64_t n : {8192, 32768, 65536}) {
        AttentionShape shape = ShapeOf(prefill.args());
        shape.q_len = shape.kv_len = n;
        shape.rows.clear();
        const ImplementationRow& row = *FindImplementation(BuiltInImplementations(), "flash");
        EXPECT_LE(row.create()->WorkspaceBytes(shape, threads).bytes, most) << n;
      }
    }
  }
}

}  // namespace
}  // namespace attn
