#include "core/measured_timings.h"

#include <algorithm>
#include <utility>

namespace attn {
namespace {

bool SameRows(const AttentionShape& a, const AttentionShape& b) {
  return std::equal(a.rows.begin(), a.rows.end(), b.rows.begin(), b.rows.end(),
                    [](const RowShape& x, const RowShape& y) {
                      return x.q_len == y.q_len && x.kv_len == y.kv_len &&
                             x.first_query_position == y.first_query_position;
                    });
}

// In all that costs depend on.
bool SameShape(const AttentionShape& a, const AttentionShape& b) {
  return a.batch == b.batch && a.num_heads == b.num_heads && a.num_kv_heads == b.num_kv_heads &&
         a.head_dim == b.head_dim && a.value_dim == b.value_dim && a.q_len == b.q_len &&
         a.kv_len == b.kv_len && a.pairs == b.pairs && a.dtype == b.dtype &&
         a.kv_dtype == b.kv_dtype && a.paged == b.paged && a.is_causal == b.is_causal &&
         a.window_left == b.window_left && a.window_right == b.window_right && a.mask == b.mask &&
         a.has_soft_cap == b.has_soft_cap && a.has_alibi == b.has_alibi && a.stage == b.stage &&
         SameRows(a, b);
}

}  // namespace

void MeasuredTimings::Record(MeasuredTiming timing) {
  std::lock_guard lock(mutex_);
  ++version_;
  for (MeasuredTiming& known : timings_) {
    if (known.implementation != timing.implementation || !SameShape(known.shape, timing.shape)) {
      continue;
    }
    known = std::move(timing);
    return;
  }
  timings_.push_back(std::move(timing));
}

std::vector<MeasuredTiming> MeasuredTimings::All() const {
  std::lock_guard lock(mutex_);
  return timings_;
}

std::uint64_t MeasuredTimings::version() const {
  std::lock_guard lock(mutex_);
  return version_;
}

}  // namespace attn
