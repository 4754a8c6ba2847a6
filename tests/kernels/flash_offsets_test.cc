// Tensors whose rows lie so far apart that offsets of 32 bits would not reach them: what flash
// computes has the bits that it has on compact ones.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <string>
#include <vector>

#include "tests/conformance/paged_problem.h"
#include "tests/kernels/flash_runner.h"
#include "tests/reference/attention_reference.h"
#include "tests/reference/problem_builder.h"

namespace attn::reference {
namespace {

using kernels::AttentionArgs;
using kernels::ElementType;
using kernels::KeyValueSpan;
using kernels::MaskType;
using kernels::Sequence;
using kernels::cpu::FlashOptions;
using kernels::cpu::IsaKernels;

class FlashOffsetsTest : public testing::TestWithParam<const IsaKernels*> {};

INSTANTIATE_TEST_SUITE_P(Isa, FlashOffsetsTest, testing::ValuesIn(FlashIsas()),
                         [](const auto& test) { return std::string(test.param->name); });

// Address space, of which only what is touched takes memory.
class HugeMemory {
 public:
  explicit HugeMemory(std::size_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~HugeMemory() {
    if (ok()) munmap(data_, bytes_);
  }
  HugeMemory(const HugeMemory&) = delete;
  HugeMemory& operator=(const HugeMemory&) = delete;
  bool ok() const { return data_ != MAP_FAILED; }
  char* data() { return static_cast<char*>(data_); }

 private:
  std::size_t bytes_;
  void* data_;
};

// `bytes` bytes of each row and head, elements of `item` bytes.
template <typename From, typename To>
void CopyRows(const From& from, const To& to, int64_t rows, int64_t heads, int64_t bytes,
              int64_t item) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      const auto at = [&](const auto& view) {
        return (row * view.row_stride + head * view.head_stride) * item;
      };
      std::memcpy(static_cast<char*>(const_cast<void*>(static_cast<const void*>(to.data))) + at(to),
                  static_cast<const char*>(from.data) + at(from), static_cast<std::size_t>(bytes));
    }
  }
}

TEST_P(FlashOffsetsTest, RowsAndHeadsBeyond32Bits) {
  // Elements: the second page of keys begins beyond 2^31, and so do rows within a page.
  constexpr int64_t kRow = (int64_t{1} << 26) + 16;
  constexpr int64_t kHead = int64_t{1} << 25;
  constexpr int64_t kRows = 70;
  for (const ElementType dtype : {ElementType::kFloat32, ElementType::kBFloat16}) {
    ProblemCase c;
    c.heads = 2;
    c.kv_heads = 2;
    c.q_len = c.kv_len = kRows;
    c.dtype = c.output_dtype = dtype;
    c.causal = true;
    c.lse = true;
    c.mask = MaskType::kBool;
    AttentionProblem problem(c);
    AttentionArgs args = problem.args();
    RunFlash(*GetParam(), args);
    const std::vector<char> bits = ResultBits(args);
    HugeMemory memory[6] = {HugeMemory(kRows * kRow * 4), HugeMemory(kRows * kRow * 4),
                            HugeMemory(kRows * kRow * 4), HugeMemory(kRows * kRow * 4),
                            HugeMemory(kRows * kRow * 4), HugeMemory(kRows * kRow)};
    for (const HugeMemory& part : memory) {
      if (!part.ok()) GTEST_SKIP() << "no address space";
    }
    const int64_t item = ElementBytes(dtype);
    Sequence sequence = args.sequences[0];
    KeyValueSpan span = sequence.spans[0];
    sequence.query = {memory[0].data(), kRow, kHead};
    span.key = {memory[1].data(), kRow, kHead};
    span.value = {memory[2].data(), kRow, kHead};
    sequence.output = {memory[3].data(), kRow, kHead};
    sequence.lse = reinterpret_cast<float*>(memory[4].data());
    sequence.lse_row_stride = kRow;
    sequence.lse_head_stride = kHead;
    const Sequence& compact = args.sequences[0];
    CopyRows(compact.query, sequence.query, kRows, 2, 16 * item, item);
    CopyRows(compact.spans[0].key, span.key, kRows, 2, 16 * item, item);
    CopyRows(compact.spans[0].value, span.value, kRows, 2, 16 * item, item);
    struct {
      const void* data;
      int64_t row_stride, head_stride;
    } near{args.mask.data, args.mask.query_stride, args.mask.head_stride},
        far{memory[5].data(), kRow, kHead};
    CopyRows(near, far, kRows, 2, kRows, 1);
    args.mask.data = far.data;
    args.mask.query_stride = kRow;
    args.mask.head_stride = kHead;
    sequence.spans = &span;
    args.sequences = &sequence;
    for (const FlashOptions& cut : {FlashOptions{1}, FlashOptions{64}, FlashOptions{1, 0, true}}) {
      PoisonResults(args);
      RunFlash(*GetParam(), args, cut);
      EXPECT_TRUE(ResultBits(args) == bits) << testing::PrintToString(cut);
    }
  }
}

TEST_P(FlashOffsetsTest, MaskKeysAndHeadsOfPagesBeyond32Bits) {
  ProblemCase c;
  c.heads = c.kv_heads = 3;
  c.q_len = 3;
  c.kv_len = 20;
  c.mask = MaskType::kBool;
  const PagedProblem problem(c, ElementType::kFloat32, false);
  AttentionArgs args = problem.args();
  RunFlash(*GetParam(), args);
  const std::vector<char> bits = ResultBits(args);
  constexpr int64_t kFar = int64_t{3} << 30;  // bytes
  HugeMemory page(3 * kFar);
  HugeMemory mask(20 * kFar);
  if (!page.ok() || !mask.ok()) GTEST_SKIP() << "no address space";
  Sequence sequence = args.sequences[0];
  const int64_t bytes = sequence.pages.head_stride;
  for (int64_t head = 0; head < 3; ++head) {
    std::memcpy(page.data() + head * kFar,
                static_cast<const char*>(sequence.pages.blocks[0]) + head * bytes,
                static_cast<std::size_t>(bytes));
  }
  const void* const block = page.data();
  sequence.pages.blocks = &block;
  sequence.pages.head_stride = kFar;
  const auto* const from = static_cast<const char*>(args.mask.data);
  for (int64_t head = 0; head < 3; ++head) {
    for (int64_t row = 0; row < 3; ++row) {
      for (int64_t key = 0; key < 20; ++key) {
        mask.data()[key * kFar + head * 3 + row] =
            from[head * args.mask.head_stride + row * args.mask.query_stride + key];
      }
    }
  }
  args.mask.data = mask.data();
  args.mask.head_stride = 3;
  args.mask.query_stride = 1;
  args.mask.key_stride = kFar;
  args.sequences = &sequence;
  PoisonResults(args);
  RunFlash(*GetParam(), args);
  EXPECT_TRUE(ResultBits(args) == bits);
}

}  // namespace
}  // namespace attn::reference
