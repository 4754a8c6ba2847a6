#include "core/cache_append.h"

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "core/page_table.h"
#include "kernels/cpu/page_packing.h"

namespace attn {
namespace {

const void* RowAt(const kernels::RowsView& rows, std::int64_t row, std::int64_t head,
                  std::int64_t item) {
  return static_cast<const char*>(rows.data) +
         (row * rows.row_stride + head * rows.head_stride) * item;
}

}  // namespace

absl::Status ReserveCache(AttentionProblem& problem, CacheCall& call) {
  std::vector<CacheCall::Growth> growth;
  const absl::Span<const kernels::KeyValueSpan> rows = problem.new_tokens();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    growth.push_back({rows[i].length, problem.first_query_position(i)});
  }
  ATTN_RETURN_IF_ERROR(call.Reserve(growth, problem.cache_dims()));
  for (std::size_t i = 0; i < rows.size(); ++i) problem.BindPages(i, call.Pages(i));
  return absl::OkStatus();
}

void AppendToCache(const AttentionProblem& problem, const CacheCall& call, Executor& executor) {
  // A task is one page: at most 64 tokens of one row and head.
  struct Piece {
    std::size_t row;
    std::int64_t token;  // within the row's new ones
    std::int64_t count;
  };
  std::vector<Piece> pieces;
  const absl::Span<const kernels::KeyValueSpan> rows = problem.new_tokens();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int64_t start = call.rows().lengths[i];
    for (std::int64_t token = 0; token < rows[i].length;) {
      const std::int64_t room = kBlockTokens - (start + token) % kBlockTokens;
      const std::int64_t count = std::min(room, rows[i].length - token);
      pieces.push_back({i, token, count});
      token += count;
    }
  }
  const CacheDims& dims = call.rows().dims;
  const kernels::PageLayout layout = LayoutOf(dims);
  const kernels::ElementType type = problem.args().dtype;
  const auto item = static_cast<std::int64_t>(ItemSize(FromElementType(type)));
  executor.ParallelFor(
      static_cast<std::int64_t>(pieces.size()) * dims.num_kv_heads, [&](std::int64_t task, int) {
        const Piece& piece = pieces[static_cast<std::size_t>(task / dims.num_kv_heads)];
        const std::int64_t head = task % dims.num_kv_heads;
        const kernels::KeyValueSpan& span = rows[piece.row];
        const std::int64_t place = call.rows().lengths[piece.row] + piece.token;
        void* const page =
            static_cast<char*>(call.PageOf(piece.row, place)) + head * layout.page_bytes();
        kernels::cpu::PackTokens(layout,
                                 {type, RowAt(span.key, piece.token, head, item),
                                  RowAt(span.value, piece.token, head, item), span.key.row_stride,
                                  span.value.row_stride},
                                 {place % kBlockTokens, piece.count}, page);
      });
}

}  // namespace attn
