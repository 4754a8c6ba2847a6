#include "bench/recovery.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/error.h"
#include "kernels/cpu/flash_attention.h"
#include "kernels/cpu/flash_scratch.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/sparse_selection.h"
#include "kernels/visible_keys.h"

namespace attn::bench {
namespace {

using kernels::AttentionArgs;
using kernels::KeyRange;
using kernels::kPageTokens;
using kernels::Sequence;
using kernels::cpu::FlashPlan;
using kernels::cpu::FlashTask;

float ElementOf(kernels::ElementType type, const void* data, std::int64_t at) {
  if (type == kernels::ElementType::kFloat32) return static_cast<const float*>(data)[at];
  const std::uint32_t bits = std::uint32_t{static_cast<const std::uint16_t*>(data)[at]} << 16;
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Rows of `count` tokens of one head as float32.
std::vector<float> Rows(kernels::ElementType type, const kernels::RowsView& rows,
                        std::int64_t first, std::int64_t count, std::int64_t head,
                        std::int64_t dim) {
  std::vector<float> result(static_cast<std::size_t>(count * dim));
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t from = (first + i) * rows.row_stride + head * rows.head_stride;
    for (std::int64_t d = 0; d < dim; ++d) {
      result[static_cast<std::size_t>(i * dim + d)] = ElementOf(type, rows.data, from + d);
    }
  }
  return result;
}

// One task: what each page holds of each row's attention.
struct TaskMass {
  std::int64_t pages = 0;
  std::vector<double> shares;         // [rows][pages]
  std::vector<std::int64_t> visible;  // [pages] (query, key) pairs
};

// Softmax of a row in double precision over scores in float32, summed by pages.
void AddRow(const float* query, const std::vector<float>& keys, const KeyRange& range, double scale,
            std::int64_t dim, std::int64_t row, TaskMass& mass) {
  std::vector<double> scores(static_cast<std::size_t>(range.end - range.begin));
  double top = -HUGE_VAL;
  for (std::int64_t j = range.begin; j < range.end; ++j) {
    const float* const key = keys.data() + j * dim;
    float parts[8] = {};
    std::int64_t d = 0;
    for (; d + 8 <= dim; d += 8) {
      for (int i = 0; i < 8; ++i) parts[i] += query[d + i] * key[d + i];
    }
    for (; d < dim; ++d) parts[0] += query[d] * key[d];
    const double score = scale * std::accumulate(parts, parts + 8, 0.0);
    scores[static_cast<std::size_t>(j - range.begin)] = score;
    top = std::max(top, score);
  }
  double sum = 0;
  double* const shares = mass.shares.data() + row * mass.pages;
  for (std::int64_t j = range.begin; j < range.end; ++j) {
    const double weight = std::exp(scores[static_cast<std::size_t>(j - range.begin)] - top);
    shares[j / kPageTokens] += weight;
    sum += weight;
    ++mass.visible[static_cast<std::size_t>(j / kPageTokens)];
  }
  for (std::int64_t p = 0; p < mass.pages; ++p) shares[p] /= sum;
}

double MeanShare(const TaskMass& mass, std::int64_t rows, const std::vector<bool>& kept) {
  double sum = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t p = 0; p < mass.pages; ++p) {
      if (kept[static_cast<std::size_t>(p)]) {
        sum += mass.shares[static_cast<std::size_t>(row * mass.pages + p)];
      }
    }
  }
  return sum / static_cast<double>(rows);
}

// The heaviest pages that fit into as many pairs as `ours` has.
std::vector<bool> OraclePages(const TaskMass& mass, std::int64_t rows,
                              const std::vector<bool>& ours) {
  std::vector<double> weights(static_cast<std::size_t>(mass.pages));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t p = 0; p < mass.pages; ++p) {
      weights[static_cast<std::size_t>(p)] +=
          mass.shares[static_cast<std::size_t>(row * mass.pages + p)];
    }
  }
  std::int64_t budget = 0;
  std::vector<std::size_t> order;
  for (std::size_t p = 0; p < weights.size(); ++p) {
    if (ours[p]) budget += mass.visible[p];
    if (mass.visible[p] > 0) order.push_back(p);
  }
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return weights[a] > weights[b]; });
  std::vector<bool> kept(weights.size());
  for (const std::size_t p : order) {
    if (mass.visible[p] > budget) continue;
    budget -= mass.visible[p];
    kept[p] = true;
  }
  return kept;
}

// Summaries and tasks as an execution makes them, with lists of pages as its tasks choose them.
class Probe {
 public:
  Probe(const AttentionArgs& args, const SparsityOptions& sparsity)
      : args_(args),
        sequence_(args.sequences[0]),
        group_(args.num_heads / args.num_kv_heads),
        sparsity_{sparsity.factor.value_or(0.0), sparsity.mass.value_or(0.0)} {}

  absl::Status Prepare(ExecutionContext& context) {
    kernels::cpu::FlashOptions options = {context.device.executor().threads()};
    options.sparsity = &sparsity_;
    plan_ = kernels::cpu::PlanFlashAttention(args_, options, nullptr);
    tasks_.resize(static_cast<std::size_t>(plan_.attend_tasks + plan_.merge_tasks));
    plan_ = kernels::cpu::PlanFlashAttention(args_, options, tasks_.data());
    ATTN_ASSIGN_OR_RETURN(void* const summaries, context.workspace.Take(plan_.summary_bytes));
    ATTN_ASSIGN_OR_RETURN(void* const scratch, context.workspace.Take(plan_.task_bytes));
    plan_.summaries = static_cast<float*>(summaries);
    std::vector<kernels::cpu::FlashSummaryTask> summary_tasks(
        static_cast<std::size_t>(plan_.summary_tasks));
    kernels::cpu::PlanFlashSummaries(args_, summary_tasks.data());
    for (const auto& task : summary_tasks) {
      kernels::cpu::RunFlashSummaryTask(args_, plan_, task, scratch);
    }
    return absl::OkStatus();
  }

  std::int64_t tasks() const { return plan_.attend_tasks; }

  void Measure(std::int64_t index, Recovery& sum, std::int64_t& kept_pairs,
               std::int64_t& visible_pairs) const {
    const FlashTask& task = tasks_[static_cast<std::size_t>(index)];
    const std::int64_t rows = task.num_rows;
    std::vector<float> queries;
    std::vector<KeyRange> ranges;
    for (std::int64_t r = task.first_row; r < task.first_row + rows; ++r) {
      const std::vector<float> row = Rows(args_.dtype, sequence_.query, r / group_, 1,
                                          task.kv_head * group_ + r % group_, args_.head_dim);
      queries.insert(queries.end(), row.begin(), row.end());
      ranges.push_back(VisibleKeys(args_, sequence_, r / group_));
    }
    const std::vector<float> keys = Rows(args_.kv_dtype, sequence_.spans[0].key, 0,
                                         sequence_.kv_len, task.kv_head, args_.head_dim);
    TaskMass mass;
    mass.pages = (sequence_.kv_len + kPageTokens - 1) / kPageTokens;
    mass.shares.resize(static_cast<std::size_t>(rows * mass.pages));
    mass.visible.resize(static_cast<std::size_t>(mass.pages));
    for (std::int64_t r = 0; r < rows; ++r) {
      AddRow(queries.data() + r * args_.head_dim, keys, ranges[static_cast<std::size_t>(r)],
             static_cast<double>(args_.scale), args_.head_dim, r, mass);
    }
    const std::vector<bool> ours = Selected(task, queries, ranges, mass.pages);
    sum.recovered_mass += MeanShare(mass, rows, ours) * static_cast<double>(rows);
    sum.oracle_mass +=
        MeanShare(mass, rows, OraclePages(mass, rows, ours)) * static_cast<double>(rows);
    sum.rows += rows;
    ++sum.tasks;
    for (std::size_t p = 0; p < ours.size(); ++p) {
      visible_pairs += mass.visible[p];
      if (ours[p]) kept_pairs += mass.visible[p];
    }
  }

 private:
  std::vector<bool> Selected(const FlashTask& task, const std::vector<float>& queries,
                             const std::vector<KeyRange>& ranges, std::int64_t pages) const {
    kernels::cpu::SelectionTask selection;
    selection.queries = queries.data();
    selection.query_stride = args_.head_dim;
    selection.ranges = ranges.data();
    kernels::cpu::SetSelection(args_, plan_, task, &selection);
    std::vector<std::int32_t> list(static_cast<std::size_t>(pages));
    std::vector<char> scratch(static_cast<std::size_t>(
        kernels::cpu::SelectionScratchBytes(task.num_rows, group_, args_.head_dim, pages) + 64));
    void* const aligned =
        reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(scratch.data()) + 63) / 64 * 64);
    const kernels::cpu::SelectionResult result =
        kernels::cpu::ActiveIsa().select_pages(selection, list.data(), aligned);
    std::vector<bool> kept(static_cast<std::size_t>(pages));
    for (std::int64_t i = 0; i < result.pages; ++i) {
      kept[static_cast<std::size_t>(list[static_cast<std::size_t>(i)])] = true;
    }
    return kept;
  }

  const AttentionArgs& args_;
  const Sequence& sequence_;
  const std::int64_t group_;
  const kernels::cpu::FlashSparsity sparsity_;
  FlashPlan plan_;
  std::vector<FlashTask> tasks_;
};

}  // namespace

absl::StatusOr<Recovery> MeasureRecovery(const AttentionArgs& args, const SparsityOptions& sparsity,
                                         std::int64_t samples, ExecutionContext& context) {
  if (args.paged || args.num_sequences != 1 || args.dtype == kernels::ElementType::kFloat16) {
    return absl::UnimplementedError("recovery is measured on one sequence of plain tensors");
  }
  Probe probe(args, sparsity);
  ATTN_RETURN_IF_ERROR(probe.Prepare(context));
  samples = std::min(samples, probe.tasks());
  std::vector<Recovery> parts(static_cast<std::size_t>(samples));
  std::vector<std::int64_t> kept(parts.size());
  std::vector<std::int64_t> visible(parts.size());
  context.device.executor().ParallelFor(samples, [&](std::int64_t i, int) {
    const auto at = static_cast<std::size_t>(i);
    probe.Measure((2 * i + 1) * probe.tasks() / (2 * samples), parts[at], kept[at], visible[at]);
  });
  Recovery sum;
  for (const Recovery& part : parts) {
    sum.recovered_mass += part.recovered_mass;
    sum.oracle_mass += part.oracle_mass;
    sum.rows += part.rows;
    sum.tasks += part.tasks;
  }
  sum.recovered_mass /= static_cast<double>(sum.rows);
  sum.oracle_mass /= static_cast<double>(sum.rows);
  sum.sparsity =
      1.0 - static_cast<double>(std::accumulate(kept.begin(), kept.end(), 0LL)) /
                static_cast<double>(std::accumulate(visible.begin(), visible.end(), 0LL));
  return sum;
}

}  // namespace attn::bench
