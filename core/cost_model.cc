#include "core/cost_model.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace attn {
namespace {

constexpr double kPeakTolerance = 4.0;
// How many octaves away a measurement still tells something.
constexpr double kReach = 1.5;
// What stands against measurements: the model itself; and, against an implementation's own ones,
// those of all others, so that a machine that is slow for everybody favours nobody.
constexpr double kModelWeight = 0.05;
constexpr double kOthersWeight = 0.1;
constexpr double kQueryTile = 64.0;
constexpr double kSegmentKeys = 2048.0;

double Count(std::int64_t value) { return static_cast<double>(std::max<std::int64_t>(value, 0)); }

// Keys and values of all rows, in elements, once each.
double KeyValueElements(const AttentionShape& shape) {
  double tokens = Count(shape.batch) * Count(shape.kv_len);
  if (shape.paged && shape.paged_tokens > 0) {
    tokens = Count(shape.paged_tokens);
  } else if (!shape.rows.empty()) {
    tokens = 0.0;
    for (const RowShape& row : shape.rows) tokens += Count(row.kv_len);
  }
  return tokens * Count(shape.num_kv_heads) * Count(shape.head_dim + shape.value_dim);
}

double QueryOutputBytes(const AttentionShape& shape) {
  double tokens = Count(shape.batch) * Count(shape.q_len);
  if (!shape.rows.empty()) {
    tokens = 0.0;
    for (const RowShape& row : shape.rows) tokens += Count(row.q_len);
  }
  return tokens * Count(shape.num_heads) *
         (Count(shape.head_dim) * static_cast<double>(ItemSize(shape.dtype)) +
          Count(shape.value_dim) * static_cast<double>(ItemSize(shape.output_dtype)));
}

// Whether position hides keys in another way than from the first query and key on.
bool NeedsPositionMask(const AttentionShape& shape) {
  if (shape.has_window) return true;
  if (!shape.is_causal) return false;
  const std::int64_t first =
      shape.rows.empty() ? shape.kv_len - shape.q_len : shape.rows.front().first_query_position;
  return first != 0 || shape.mask != kernels::MaskType::kNone;
}

// Of the units, those that the work keeps busy.
double BusyUnits(const ImplementationCosts& costs, const AttentionShape& shape, int units) {
  double tasks = Count(shape.batch) * Count(shape.num_heads);
  if (costs.divides_heads) {
    tasks *= std::max({1.0, Count(shape.q_len) / kQueryTile, Count(shape.kv_len) / kSegmentKeys});
  }
  return std::clamp(tasks, 1.0, static_cast<double>(std::max(units, 1)));
}

double OctavesBetween(std::int64_t a, std::int64_t b) {
  return std::log2(std::max(Count(a), 1.0) / std::max(Count(b), 1.0));
}

// Squared distance in octaves; infinite between shapes that are different kinds of work.
double SquaredDistance(const AttentionShape& a, const AttentionShape& b) {
  if (a.dtype != b.dtype || a.kv_dtype != b.kv_dtype || a.paged != b.paged ||
      a.is_causal != b.is_causal || a.has_window != b.has_window || a.mask != b.mask ||
      a.stage != b.stage) {
    return INFINITY;
  }
  const double differences[] = {
      OctavesBetween(a.batch, b.batch),         OctavesBetween(a.q_len, b.q_len),
      OctavesBetween(a.kv_len, b.kv_len),       OctavesBetween(a.pairs, b.pairs),
      OctavesBetween(a.num_heads, b.num_heads), OctavesBetween(a.num_kv_heads, b.num_kv_heads),
      OctavesBetween(a.head_dim, b.head_dim),   OctavesBetween(a.value_dim, b.value_dim)};
  double sum = 0.0;
  for (double difference : differences) sum += difference * difference;
  return sum;
}

}  // namespace

CostModel::CostModel(const HardwareProfile& profile, int units, const MeasuredTimings* timings,
                     Operations operations)
    : profile_(profile),
      units_(std::max(units, 1)),
      timings_(timings),
      operations_(std::move(operations)),
      operation_rate_(profile.operations_per_cycle.float32 * profile.clock_hz),
      byte_rate_(profile.bytes_per_second) {}

void CostModel::SetPeaks(const Peaks& peaks) {
  if (!(peaks.operations_per_second > 0.0) || !(peaks.bytes_per_second > 0.0)) return;
  const auto near = [](double measured, double expected) {
    return std::clamp(measured, expected / kPeakTolerance, expected * kPeakTolerance);
  };
  operation_rate_.store(near(peaks.operations_per_second / units_,
                             profile_.operations_per_cycle.float32 * profile_.clock_hz));
  byte_rate_.store(near(peaks.bytes_per_second, profile_.bytes_per_second));
  peaks_version_.fetch_add(1);
}

double CostModel::Uncorrected(const std::string& implementation, const AttentionShape& shape,
                              std::uint64_t operations) const {
  const ImplementationCosts& costs = profile_.CostsOf(implementation);
  const double busy = BusyUnits(costs, shape, units_);
  // Products run at the rate of the narrower operand's dtype.
  const DType dtype = shape.kv_dtype;
  const double rate = operation_rate_.load() * profile_.operations_per_cycle.Of(dtype) /
                      profile_.operations_per_cycle.float32 * costs.share.Of(dtype);
  const double bytes = static_cast<double>(ItemSize(dtype));
  const double pairs = Count(shape.pairs);
  double traffic = QueryOutputBytes(shape) * costs.query_passes;
  traffic += KeyValueElements(shape) * bytes * (shape.paged ? costs.page_passes : costs.key_passes);
  traffic += pairs * Count(shape.num_heads) * sizeof(float) * costs.score_passes;
  if (NeedsPositionMask(shape)) traffic += pairs * costs.position_mask_passes;
  return costs.call_seconds +
         costs.head_seconds * Count(shape.batch) * Count(shape.num_heads) / busy +
         static_cast<double>(operations) / (rate * busy) + traffic / byte_rate_.load();
}

double CostModel::Estimate(const std::string& implementation, const AttentionShape& shape,
                           std::uint64_t operations) const {
  return Uncorrected(implementation, shape, operations) * Correction(implementation, shape);
}

std::uint64_t CostModel::version() const {
  return peaks_version_.load() + (timings_ == nullptr ? 0 : timings_->version());
}

// Points are made again when timings or peaks have changed.
std::shared_ptr<const std::vector<CostModel::Point>> CostModel::Points() const {
  const std::uint64_t current = version();
  std::lock_guard lock(mutex_);
  if (points_ != nullptr && points_version_ == current) return points_;
  auto points = std::make_shared<std::vector<Point>>();
  for (MeasuredTiming& timing : timings_->All()) {
    const double expected = Uncorrected(timing.implementation, timing.shape,
                                        operations_(timing.implementation, timing.shape));
    if (!(timing.seconds > 0.0) || !(expected > 0.0)) continue;
    timing.shape.rows.clear();
    points->push_back({std::move(timing.implementation), std::move(timing.shape),
                       std::log(timing.seconds / expected)});
  }
  points_ = std::move(points);
  points_version_ = current;
  return points_;
}

double CostModel::Correction(const std::string& implementation, const AttentionShape& shape) const {
  if (timings_ == nullptr || timings_->version() == 0) return 1.0;
  double weights = 0.0;
  double ratios = 0.0;
  double own_weights = 0.0;
  double own_ratios = 0.0;
  for (const Point& point : *Points()) {
    const double distance = SquaredDistance(point.shape, shape);
    const bool own = point.implementation == implementation;
    if (own && distance == 0.0) return std::exp(point.log_ratio);
    const double weight = std::exp(-distance / (2.0 * kReach * kReach));
    weights += weight;
    ratios += weight * point.log_ratio;
    if (!own) continue;
    own_weights += weight;
    own_ratios += weight * point.log_ratio;
  }
  const double everybody = ratios / (weights + kModelWeight);
  return std::exp((own_ratios + kOthersWeight * everybody) / (own_weights + kOthersWeight));
}

}  // namespace attn
