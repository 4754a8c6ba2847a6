#include "core/token_positions.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/rotary.h"

namespace attn {
namespace {

absl::Status CheckShape(const TensorView& ids, const TokenRows& tokens, int axes) {
  if (ids.dtype != DType::kInt64) {
    return InvalidField("position_ids", absl::StrCat("position_ids is ", DTypeName(ids.dtype),
                                                     ", but must be int64"));
  }
  const int own_rank = tokens.packed ? 1 : 2;
  bool fits = ids.rank == own_rank || ids.rank == own_rank + 1;
  if (fits && tokens.packed) fits = ids.extent(ids.rank - 1) == tokens.count;
  if (fits && !tokens.packed) {
    const std::int64_t rows = ids.extent(ids.rank - 2);
    fits = (rows == 1 || rows == tokens.batch) && ids.extent(ids.rank - 1) == tokens.length;
  }
  if (fits && ids.rank > own_rank) fits = ids.extent(0) == 1 || ids.extent(0) == axes;
  if (fits) return absl::OkStatus();
  return InvalidField(
      "position_ids",
      absl::StrCat("position_ids has shape ", ShapeText(ids),
                   ", which does not fit the tokens of hidden_states and the layer's ", axes,
                   axes == 1 ? " axis" : " axes"));
}

absl::Status CheckPosition(std::int64_t position, const HostedLayer& layer) {
  if (position < 0) {
    return InvalidField("position_ids", absl::StrCat("position_ids has an entry of ", position));
  }
  if (layer.max_positions == 0 || position < layer.max_positions) return absl::OkStatus();
  return MakeError(absl::StatusCode::kOutOfRange, "POSITION_OUT_OF_RANGE",
                   absl::StrCat("position ", position, " is beyond the model's last one, ",
                                layer.max_positions - 1),
                   {{"max_positions", absl::StrCat(layer.max_positions)}});
}

// Row `index` of `ids`, whose axes are its first dimension where it has one more than the tokens.
void ReadRow(const TensorView& ids, const TokenRows& tokens, std::size_t index,
             TokenPositions::Row& row) {
  const int own_rank = tokens.packed ? 1 : 2;
  const std::int64_t axes = ids.rank > own_rank ? ids.extent(0) : 1;
  const std::int64_t axis_size = ids.num_elements() / std::max<std::int64_t>(axes, 1);
  std::int64_t first = row.start;
  if (!tokens.packed) {
    first = ids.extent(ids.rank - 2) == 1 ? 0 : static_cast<std::int64_t>(index) * tokens.length;
  }
  row.axis_stride = axes > 1 ? row.count : 0;
  row.positions.resize(static_cast<std::size_t>(axes * row.count));
  for (std::int64_t axis = 0; axis < axes && row.count > 0; ++axis) {
    std::memcpy(row.positions.data() + axis * row.count,
                static_cast<const std::int64_t*>(ids.data) + axis * axis_size + first,
                static_cast<std::size_t>(row.count) * sizeof(std::int64_t));
  }
}

}  // namespace

absl::StatusOr<TokenPositions> TokenPositions::Create(const TensorView& ids,
                                                      const TokenRows& tokens,
                                                      const std::vector<std::int64_t>& places,
                                                      const HostedLayer& layer) {
  const int axes = layer.rotary == nullptr ? 1 : layer.rotary->axes();
  if (ids.defined()) {
    // Positions of a learned table are one per token, whatever axes they come in.
    ATTN_RETURN_IF_ERROR(CheckShape(ids, tokens, axes));
  } else if (layer.rotary != nullptr && layer.rotary->needs_positions()) {
    return InvalidField("position_ids",
                        "position_ids is missing: the layer's rotary embedding has several axes");
  }
  TokenPositions positions;
  std::int64_t start = 0;
  for (std::size_t b = 0; b < static_cast<std::size_t>(tokens.batch); ++b) {
    Row row;
    row.start = tokens.packed ? start : static_cast<std::int64_t>(b) * tokens.length;
    row.count = tokens.length_of(b);
    start += row.count;
    if (ids.defined()) {
      ReadRow(ids, tokens, b, row);
    } else {
      row.positions.resize(static_cast<std::size_t>(row.count));
      std::iota(row.positions.begin(), row.positions.end(), places[b]);
    }
    if (!row.positions.empty()) {
      const auto [least, largest] = std::minmax_element(row.positions.begin(), row.positions.end());
      row.largest = *largest;
      // A place before a row's first key has no entry in a learned table, and sees nothing.
      if (ids.defined()) ATTN_RETURN_IF_ERROR(CheckPosition(*least, layer));
      if (ids.defined() || *largest >= 0) ATTN_RETURN_IF_ERROR(CheckPosition(*largest, layer));
    }
    positions.rows_.push_back(std::move(row));
  }
  return positions;
}

}  // namespace attn
