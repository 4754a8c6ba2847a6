#include "core/timings_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "core/error.h"
#include "core/hardware.h"
#include "core/json.h"
#include "core/regular_file.h"

namespace attn {
namespace {

using nlohmann::json;

constexpr int kFormat = 1;
constexpr std::size_t kMostTimings = 4096;
constexpr std::size_t kMostBytes = std::size_t{64} << 20;
constexpr std::size_t kMostRows = 4096;  // of one shape
constexpr char kLabel[] = "the timings file";
constexpr char kBroken[] = "BROKEN_TIMINGS";

// Every field of AttentionShape by its name, for both directions.
template <typename Visitor, typename Shape>
void VisitShape(Shape& shape, Visitor&& visit) {
  visit("batch", shape.batch);
  visit("num_heads", shape.num_heads);
  visit("num_kv_heads", shape.num_kv_heads);
  visit("head_dim", shape.head_dim);
  visit("value_dim", shape.value_dim);
  visit("q_len", shape.q_len);
  visit("kv_len", shape.kv_len);
  visit("longest_pairs", shape.longest_pairs);
  visit("pairs", shape.pairs);
  visit("paged_tokens", shape.paged_tokens);
  visit("dtype", shape.dtype);
  visit("kv_dtype", shape.kv_dtype);
  visit("output_dtype", shape.output_dtype);
  visit("paged", shape.paged);
  visit("ragged", shape.ragged);
  visit("split_keys", shape.split_keys);
  visit("is_causal", shape.is_causal);
  visit("has_window", shape.has_window);
  visit("window_left", shape.window_left);
  visit("window_right", shape.window_right);
  visit("has_soft_cap", shape.has_soft_cap);
  visit("has_alibi", shape.has_alibi);
  visit("has_sinks", shape.has_sinks);
  visit("mask", shape.mask);
  visit("mask_extent", shape.mask_extent);
  visit("stage", shape.stage);
  visit("output_lse", shape.output_lse);
}

// Of an enum: its values are 0 to the last one.
constexpr std::int64_t LastOf(DType) { return static_cast<std::int64_t>(DType::kInt8); }
constexpr std::int64_t LastOf(kernels::MaskType) {
  return static_cast<std::int64_t>(kernels::MaskType::kBFloat16);
}
constexpr std::int64_t LastOf(kernels::ScoreStage) {
  return static_cast<std::int64_t>(kernels::ScoreStage::kProbabilities);
}

struct Writer {
  json& object;
  void operator()(const char* name, std::int64_t value) { object[name] = value; }
  void operator()(const char* name, bool value) { object[name] = value; }
  template <typename Enum>
  requires std::is_enum_v<Enum>
  void operator()(const char* name, Enum value) { object[name] = static_cast<std::int64_t>(value); }
};

const json* Member(const json& object, const char* name) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(name);
  return found == object.end() ? nullptr : &*found;
}

// An integer that int64 holds.
bool ReadInteger(const json* value, std::int64_t low, std::int64_t& out) {
  if (value == nullptr || !value->is_number_integer()) return false;
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (value->is_number_unsigned() && value->get<std::uint64_t>() > kMost) return false;
  out = value->get<std::int64_t>();
  return out >= low;
}

struct Reader {
  const json& object;
  bool& good;

  void operator()(const char* name, std::int64_t& value) {
    good = good && ReadInteger(Member(object, name), -1, value);
  }
  void operator()(const char* name, bool& value) {
    const json* const member = Member(object, name);
    good = good && member != nullptr && member->is_boolean();
    if (good) value = member->get<bool>();
  }
  template <typename Enum>
  requires std::is_enum_v<Enum>
  void operator()(const char* name, Enum& value) {
    std::int64_t number = 0;
    good = good && ReadInteger(Member(object, name), 0, number) && number <= LastOf(Enum());
    if (good) value = static_cast<Enum>(number);
  }
};

json ToJson(const MeasuredTiming& timing) {
  json shape = json::object();
  VisitShape(timing.shape, Writer{shape});
  json rows = json::array();
  for (const RowShape& row : timing.shape.rows) {
    rows.push_back({row.q_len, row.kv_len, row.first_query_position});
  }
  shape["rows"] = std::move(rows);
  return {{"implementation", timing.implementation},
          {"seconds", timing.seconds},
          {"shape", std::move(shape)}};
}

bool ReadRows(const json* rows, AttentionShape& shape) {
  if (rows == nullptr || !rows->is_array() || rows->size() > kMostRows) return false;
  constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::min();
  for (const json& row : *rows) {
    RowShape& read = shape.rows.emplace_back();
    if (!row.is_array() || row.size() != 3 || !ReadInteger(&row[0], 0, read.q_len) ||
        !ReadInteger(&row[1], 0, read.kv_len) ||
        !ReadInteger(&row[2], kAny, read.first_query_position)) {
      return false;
    }
  }
  return rows->empty() || static_cast<std::int64_t>(rows->size()) == shape.batch;
}

bool FromJson(const json& object, MeasuredTiming& timing) {
  const json* const name = Member(object, "implementation");
  const json* const seconds = Member(object, "seconds");
  const json* const shape = Member(object, "shape");
  if (name == nullptr || !name->is_string() || seconds == nullptr || !seconds->is_number() ||
      shape == nullptr) {
    return false;
  }
  timing.implementation = name->get<std::string>();
  timing.seconds = seconds->get<double>();
  bool good = timing.seconds > 0.0 && timing.seconds < 1e9;
  VisitShape(timing.shape, Reader{*shape, good});
  return good && ReadRows(Member(*shape, "rows"), timing.shape);
}

absl::Status Broken(const std::string& what) {
  return MakeError(absl::StatusCode::kInvalidArgument, kBroken, absl::StrCat(kLabel, " ", what));
}

std::string TextMember(const json& object, const char* name) {
  const json* const member = Member(object, name);
  return member != nullptr && member->is_string() ? member->get<std::string>() : "";
}

absl::Status CheckKey(const json& file, const TimingsKey& key) {
  std::int64_t format = 0;
  if (!ReadInteger(Member(file, "format"), 0, format)) return Broken("has no format");
  const std::string hardware = TextMember(file, "hardware");
  const std::string version = TextMember(file, "version");
  if (format == kFormat && hardware == key.hardware && version == key.version) {
    return absl::OkStatus();
  }
  return MakeError(
      absl::StatusCode::kFailedPrecondition, "TIMINGS_OF_ANOTHER",
      absl::StrCat(kLabel, " is of ", Quoted(hardware), " and version ", Quoted(version),
                   ", this is ", Quoted(key.hardware), " and version ", Quoted(key.version)));
}

// Writes, and has the disk write, all of it.
bool WriteAll(int file, const std::string& text) {
  for (std::size_t at = 0; at < text.size();) {
    const ssize_t wrote = write(file, text.data() + at, text.size() - at);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) return false;
    at += static_cast<std::size_t>(wrote);
  }
  return fsync(file) == 0;
}

}  // namespace

std::string DescribeTimingsHardware(int threads) {
  const CpuHardware cpu = DescribeCpu();
  return absl::StrCat(cpu.model, ", ", cpu.active, ", ", threads,
                      threads == 1 ? " thread" : " threads");
}

absl::StatusOr<std::size_t> LoadTimings(const std::string& path, const TimingsKey& key,
                                        MeasuredTimings& timings) {
  struct stat ignored;
  if (stat(path.c_str(), &ignored) != 0 && errno == ENOENT) {
    return absl::NotFoundError(absl::StrCat(kLabel, " is not there yet"));
  }
  ATTN_ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(path, kLabel, kBroken, kMostBytes));
  ATTN_ASSIGN_OR_RETURN(const json file, ParseJsonObject(text, kLabel, kBroken));
  ATTN_RETURN_IF_ERROR(CheckKey(file, key));
  const json* const list = Member(file, "timings");
  if (list == nullptr || !list->is_array() || list->size() > kMostTimings) {
    return Broken("has no list of timings");
  }
  std::vector<MeasuredTiming> read(list->size());
  for (std::size_t i = 0; i < read.size(); ++i) {
    if (!FromJson((*list)[i], read[i])) return Broken(absl::StrCat("has a wrong timing, ", i));
  }
  for (MeasuredTiming& timing : read) timings.Record(std::move(timing));
  return read.size();
}

absl::Status SaveTimings(const std::string& path, const TimingsKey& key,
                         const MeasuredTimings& timings) {
  const std::vector<MeasuredTiming> all = timings.All();
  json list = json::array();
  for (std::size_t i = all.size() - std::min(all.size(), kMostTimings); i < all.size(); ++i) {
    if (all[i].shape.rows.size() <= kMostRows) list.push_back(ToJson(all[i]));
  }
  const json file = {{"format", kFormat},
                     {"hardware", key.hardware},
                     {"version", key.version},
                     {"timings", std::move(list)}};
  const std::string text = file.dump(1, ' ', true, json::error_handler_t::replace) + "\n";
  const std::string partial = absl::StrCat(path, ".partial");
  const int descriptor = open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  bool written = descriptor >= 0 && WriteAll(descriptor, text);
  if (descriptor >= 0) written = close(descriptor) == 0 && written;
  if (written && std::rename(partial.c_str(), path.c_str()) == 0) return absl::OkStatus();
  const std::string why = std::strerror(errno);
  if (descriptor >= 0) unlink(partial.c_str());
  return MakeError(absl::StatusCode::kInternal, "TIMINGS_NOT_WRITTEN",
                   absl::StrCat(kLabel, " can't be written: ", why));
}

}  // namespace attn
