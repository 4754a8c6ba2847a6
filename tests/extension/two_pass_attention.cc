#include "tests/extension/two_pass_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/dtype_conversion.h"
#include "core/error.h"
#include "core/implementations/plain_rows.h"
#include "kernels/visible_keys.h"

namespace attn {
namespace {

using kernels::AttentionArgs;
using kernels::KeyRange;
using kernels::Sequence;

constexpr double kHidden = -std::numeric_limits<double>::infinity();
constexpr std::size_t kAlignment = 64;

// Scratch memory of one running task: a query's scores and its output in double precision, the
// query and one key or value in float32.
struct TaskLayout {
  std::int64_t kv_len = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;

  std::size_t bytes() const {
    const auto doubles = static_cast<std::size_t>(kv_len + value_dim);
    const auto floats = static_cast<std::size_t>(head_dim + std::max(head_dim, value_dim));
    const std::size_t used = doubles * sizeof(double) + floats * sizeof(float);
    return (used + kAlignment - 1) / kAlignment * kAlignment;
  }
};

TaskLayout LayoutOf(const AttentionShape& shape) {
  return {shape.kv_len, shape.head_dim, shape.value_dim};
}

std::uint64_t NumTasks(const AttentionShape& shape) {
  return static_cast<std::uint64_t>(std::max<std::int64_t>(shape.batch * shape.num_heads, 1));
}

// One head of one sequence.
class Task {
 public:
  Task(const AttentionArgs& args, const Sequence& sequence, std::int64_t head,
       const TaskLayout& layout, void* workspace)
      : args_(args),
        sequence_(sequence),
        head_(head),
        kv_head_(head / (args.num_heads / args.num_kv_heads)),
        scores_(static_cast<double*>(workspace)),
        output_(scores_ + layout.kv_len),
        query_(reinterpret_cast<float*>(output_ + layout.value_dim)),
        row_(query_ + layout.head_dim) {}

  void Run(const ExecutionContext& context) {
    for (std::int64_t i = 0; i < sequence_.q_len && !context.IsCancelled(); ++i) RunQuery(i);
  }

 private:
  void RunQuery(std::int64_t i) {
    const KeyRange keys = VisibleKeys(args_, sequence_, i);
    Read(sequence_.query, args_.dtype, i, head_, args_.head_dim, query_);
    const double sink =
        args_.sink_logits == nullptr ? kHidden : static_cast<double>(args_.sink_logits[head_]);
    double top = sink;
    ForEachKey(keys, [&](const kernels::KeyValueSpan& span, std::int64_t k, std::int64_t key) {
      scores_[key] = Score(span, k, i, key);
      top = std::max(top, scores_[key]);
    });
    double sum = sink == kHidden ? 0.0 : std::exp(sink - top);
    std::fill_n(output_, args_.value_dim, 0.0);
    ForEachKey(keys, [&](const kernels::KeyValueSpan& span, std::int64_t k, std::int64_t key) {
      if (scores_[key] == kHidden) return;  // by the mask: its value may be anything
      const double weight = std::exp(scores_[key] - top);
      sum += weight;
      Read(span.value, args_.kv_dtype, k, kv_head_, args_.value_dim, row_);
      for (std::int64_t j = 0; j < args_.value_dim; ++j) {
        output_[j] += weight * static_cast<double>(row_[j]);
      }
    });
    Write(i, top, sum);
  }

  // Calls each(span, place in the span, place in the sequence) for the keys that position lets see.
  template <typename Each>
  void ForEachKey(const KeyRange& keys, Each each) const {
    std::int64_t first = 0;  // of the span
    for (std::int64_t s = 0; s < sequence_.num_spans; ++s) {
      const kernels::KeyValueSpan& span = sequence_.spans[s];
      const std::int64_t end = std::min(keys.end, first + span.length);
      for (std::int64_t key = std::max(keys.begin, first); key < end; ++key) {
        each(span, key - first, key);
      }
      first += span.length;
    }
  }

  double Score(const kernels::KeyValueSpan& span, std::int64_t k, std::int64_t i,
               std::int64_t key) const {
    const double bias = MaskBias(i, key);
    if (bias == kHidden) return kHidden;  // whatever the key is
    Read(span.key, args_.kv_dtype, k, kv_head_, args_.head_dim, row_);
    double score = 0.0;
    for (std::int64_t j = 0; j < args_.head_dim; ++j) {
      score += static_cast<double>(query_[j]) * static_cast<double>(row_[j]);
    }
    score *= static_cast<double>(args_.scale);
    if (args_.soft_cap > 0.0f) {
      const auto cap = static_cast<double>(args_.soft_cap);
      score = cap * std::tanh(score / cap);
    }
    if (args_.alibi_slopes != nullptr) {
      const auto distance = static_cast<double>(sequence_.first_query_position + i - key);
      score -= static_cast<double>(args_.alibi_slopes[head_]) * std::abs(distance);
    }
    return score + bias;
  }

  // What the mask adds to a score: 0, a bias, or -inf.
  double MaskBias(std::int64_t i, std::int64_t key) const {
    const kernels::Mask& mask = args_.mask;
    if (mask.type == kernels::MaskType::kNone) return 0.0;
    const std::int64_t at = sequence_.mask_row * mask.batch_stride + head_ * mask.head_stride +
                            i * mask.query_stride + key * mask.key_stride;
    if (mask.type == kernels::MaskType::kBool) {
      return static_cast<const std::uint8_t*>(mask.data)[at] != 0 ? 0.0 : kHidden;
    }
    DType dtype = DType::kFloat32;
    if (mask.type == kernels::MaskType::kFloat16) dtype = DType::kFloat16;
    if (mask.type == kernels::MaskType::kBFloat16) dtype = DType::kBFloat16;
    float bias = 0.0f;
    ConvertElements(
        static_cast<const char*>(mask.data) + at * static_cast<std::int64_t>(ItemSize(dtype)),
        dtype, &bias, DType::kFloat32, 1);
    return static_cast<double>(bias);
  }

  static void Read(const kernels::RowsView& rows, kernels::ElementType type, std::int64_t row,
                   std::int64_t head, std::int64_t count, float* to) {
    const DType dtype = FromElementType(type);
    const std::int64_t at = row * rows.row_stride + head * rows.head_stride;
    ConvertElements(
        static_cast<const char*>(rows.data) + at * static_cast<std::int64_t>(ItemSize(dtype)),
        dtype, to, DType::kFloat32, static_cast<std::size_t>(count));
  }

  // A row that sees no key has sum 0: zeros, and a log-sum-exp of -inf.
  void Write(std::int64_t i, double top, double sum) {
    for (std::int64_t j = 0; j < args_.value_dim; ++j) {
      row_[j] = sum == 0.0 ? 0.0f : static_cast<float>(output_[j] / sum);
    }
    const DType dtype = FromElementType(args_.output_dtype);
    const kernels::MutableRowsView& out = sequence_.output;
    const std::int64_t at = i * out.row_stride + head_ * out.head_stride;
    ConvertElements(row_, DType::kFloat32,
                    static_cast<char*>(out.data) + at * static_cast<std::int64_t>(ItemSize(dtype)),
                    dtype, static_cast<std::size_t>(args_.value_dim));
    if (sequence_.lse == nullptr) return;
    sequence_.lse[i * sequence_.lse_row_stride + head_ * sequence_.lse_head_stride] =
        static_cast<float>(sum == 0.0 ? kHidden : top + std::log(sum));
  }

  const AttentionArgs& args_;
  const Sequence& sequence_;
  const std::int64_t head_;
  const std::int64_t kv_head_;
  double* const scores_;  // [kv_len]
  double* const output_;  // [value_dim]
  float* const query_;    // [head_dim]
  float* const row_;      // a key, a value or the output
};

class TwoPassAttention final : public AttentionImplementation {
 public:
  absl::Status Attend(const AttentionArgs& given, const AttentionShape& shape,
                      ExecutionContext& context) const override {
    ATTN_ASSIGN_OR_RETURN(const PlainRows rows, PlainRows::Create(given, shape, context));
    const AttentionArgs& args = rows.args();
    const TaskLayout layout = LayoutOf(shape);
    Executor& executor = context.device.executor();
    const auto workers = std::min(static_cast<std::uint64_t>(executor.threads()), NumTasks(shape));
    ATTN_ASSIGN_OR_RETURN(void* const workspace, context.workspace.Take(layout.bytes() * workers));
    executor.ParallelFor(args.num_sequences * args.num_heads, [&](std::int64_t task, int worker) {
      char* const own =
          static_cast<char*>(workspace) + layout.bytes() * static_cast<std::size_t>(worker);
      Task(args, args.sequences[task / args.num_heads], task % args.num_heads, layout, own)
          .Run(context);
    });
    context.flops += FlopsOf(given);
    return absl::OkStatus();
  }

  MemoryUsage WorkspaceBytes(const AttentionShape& shape, int workers) const override {
    const std::uint64_t running = std::min(static_cast<std::uint64_t>(workers), NumTasks(shape));
    return {PlainRows::WorkspaceBytes(shape) + LayoutOf(shape).bytes() * running, true};
  }

  ComputeComplexity Complexity(const AttentionShape& shape) const override {
    const ShapeProblem problem(shape);
    return {FlopsOf(problem.args()), "O(n^2 d)"};
  }

 private:
  static std::uint64_t FlopsOf(const AttentionArgs& args) {
    std::uint64_t pairs = 0;
    for (std::int64_t s = 0; s < args.num_sequences; ++s) {
      for (std::int64_t i = 0; i < args.sequences[s].q_len; ++i) {
        const KeyRange keys = VisibleKeys(args, args.sequences[s], i);
        pairs += static_cast<std::uint64_t>(keys.end - keys.begin);
      }
    }
    return 2 * pairs * static_cast<std::uint64_t>(args.num_heads) *
           static_cast<std::uint64_t>(args.head_dim + args.value_dim);
  }
};

absl::Status Supports(const AttentionShape& shape) {
  if (shape.stage == kernels::ScoreStage::kNone) return absl::OkStatus();
  return Unsupported("two_pass does not return attention weights");
}

}  // namespace

ImplementationRow TwoPassAttentionRow() {
  Traits traits;
  traits.backends = {"cpu"};
  traits.dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  traits.exact = true;
  traits.outputs_attentions = false;
  traits.batch_invariant = true;
  traits.memory = "O(n)";
  traits.compute = "O(n^2 d)";
  traits.description = "Two plain passes over a query's keys, in double precision";
  return {"two_pass", std::move(traits), &Supports,
          [] { return std::unique_ptr<AttentionImplementation>(new TwoPassAttention); }};
}

}  // namespace attn
