#include "core/position_encoding.h"

#include <algorithm>
#include <vector>

#include "core/error.h"

namespace attn {
namespace {

// Of one task: enough to pay for handing it out, few enough to share a prompt among the cores.
constexpr std::int64_t kTaskTokens = 32;

struct Task {
  const TokenPositions::Row* row;
  std::int64_t first;
  std::int64_t count;
};

}  // namespace

std::uint64_t PositionWorkspaceBytes(const Rotary& rotary, int workers) {
  return static_cast<std::uint64_t>(2 * kTaskTokens * rotary.pairs() * workers) * sizeof(float);
}

absl::Status EncodePositions(const Rotary& rotary, const TokenPositions& positions,
                             const ProjectedHeads& heads, ExecutionContext& context) {
  std::vector<Task> tasks;
  for (const TokenPositions::Row& row : positions.rows()) {
    for (std::int64_t first = 0; first < row.count; first += kTaskTokens) {
      tasks.push_back({&row, first, std::min(kTaskTokens, row.count - first)});
    }
  }
  Executor& executor = context.device.executor();
  ATTN_ASSIGN_OR_RETURN(void* const scratch,
                        context.workspace.Take(PositionWorkspaceBytes(rotary, executor.threads())));
  const auto item = static_cast<std::int64_t>(ItemSize(heads.dtype));
  executor.ParallelFor(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i, int worker) {
    const Task& task = tasks[static_cast<std::size_t>(i)];
    float* const cos = static_cast<float*>(scratch) + 2 * kTaskTokens * rotary.pairs() * worker;
    float* const sin = cos + kTaskTokens * rotary.pairs();
    rotary.Angles(task.row->positions.data() + task.first, task.row->axis_stride, task.count,
                  task.row->largest, cos, sin);
    for (std::int64_t t = 0; t < task.count; ++t) {
      char* const row = static_cast<char*>(heads.data) +
                        (task.row->start + task.first + t) * heads.row_stride * item;
      for (std::int64_t head = 0; head < heads.heads; ++head) {
        rotary.Rotate(row + head * heads.head_dim * item, heads.dtype, cos + t * rotary.pairs(),
                      sin + t * rotary.pairs());
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace attn
