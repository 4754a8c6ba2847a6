// Where a call's tokens stand for position encoding: position_ids, or each query's place among its
// keys. Copied, since shared memory could change under them, and checked.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "core/hosted_model.h"
#include "core/tensor_view.h"

namespace attn {

// How a call's tokens lie among the rows of its GEMMs.
struct TokenRows {
  bool packed = false;                // rows end to end
  std::int64_t batch = 0;             // packed: of query_lengths
  std::int64_t length = 0;            // of the padded rows; packed: of the longest row
  std::int64_t count = 0;             // rows of the GEMMs, padding included
  std::vector<std::int64_t> lengths;  // tokens of each batch row; empty: all of `length`

  std::int64_t length_of(std::size_t row) const { return lengths.empty() ? length : lengths[row]; }
};

class TokenPositions {
 public:
  // `ids` is int64 [batch or 1, length] (packed: [count]) or the same with the layer's axes in
  // front; where it is undefined, row b's tokens stand at places[b] and behind. INVALID_ARGUMENT,
  // or OUT_OF_RANGE (reason POSITION_OUT_OF_RANGE) beyond the layer's max_positions. Positions of
  // padding are not looked at.
  static absl::StatusOr<TokenPositions> Create(const TensorView& ids, const TokenRows& tokens,
                                               const std::vector<std::int64_t>& places,
                                               const HostedLayer& layer);

  struct Row {
    std::int64_t start = 0;  // of its tokens among the rows of the GEMMs
    std::int64_t count = 0;
    std::vector<std::int64_t> positions;  // [axes][count]
    std::int64_t axis_stride = 0;         // 0: one axis serves all
    std::int64_t largest = 0;
  };
  const std::vector<Row>& rows() const { return rows_; }

 private:
  std::vector<Row> rows_;
};

}  // namespace attn
