#include "server/config.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/attention_benchmark.h"
#include "core/attention_implementation.h"
#include "core/error.h"
#include "core/hardware.h"
#include "server/listen_address.h"

namespace attn::server {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::TextFormat;

constexpr char kDefaultListen[] = "127.0.0.1:7700";
constexpr char kDefaultMetrics[] = "127.0.0.1:7701";

// Keeps the first error: the later ones follow from it.
class FirstError final : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, google::protobuf::io::ColumnNumber column,
                const std::string& message) override {
    if (text_.empty()) text_ = absl::StrCat(line + 1, ":", column + 1, ": ", message);
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// A number's range. 0 is "unset" in the file as on the command line, and takes the default.
struct Range {
  const char* field;
  double low;
  double high;
};

constexpr double kMiB = 1 << 20;
constexpr double kGiB = 1 << 30;
constexpr Range kRanges[] = {
    {"max_message_bytes", 4096, 2 * kGiB - 1},
    {"max_inflight_bytes", kMiB, 1024 * kGiB},
    {"queue_capacity", 1, 1 << 20},
    {"max_tokens", 1, 1 << 28},
    {"threads", 1, 1024},
    {"executor_spin_microseconds", 0, 10000},
    {"drain_seconds", 0, 3600},
    {"max_workspace_bytes", kMiB, 1024 * kGiB},
    {"memory_efficient_bytes", 4096, 1024 * kGiB},
    {"cache_bytes", 4096, 4096 * kGiB},
    {"max_sessions", 1, 1 << 24},
    {"session_time_to_live_seconds", 0.001, 1e9},
    {"max_session_time_to_live_seconds", 0.001, 1e9},
    {"max_stream_requests", 1, 1 << 20},
    {"benchmark_share", 0.001, 1},
    {"benchmark_seconds", 0.001, 3600},
    {"benchmark_bytes", 4096, 1024 * kGiB},
    {"max_stream_bytes", 4096, 1024 * kGiB},
};

double NumberOf(const ServerConfig& config, const FieldDescriptor& field) {
  const google::protobuf::Reflection& reflection = *config.GetReflection();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT64:
      return static_cast<double>(reflection.GetUInt64(config, &field));
    case FieldDescriptor::CPPTYPE_UINT32:
      return reflection.GetUInt32(config, &field);
    default:
      return reflection.GetDouble(config, &field);
  }
}

// A broken rule, by the field that breaks it.
struct Violation {
  const FieldDescriptor* field;
  int index;  // of a repeated field; otherwise -1
  std::string text;
};

std::optional<Violation> FindViolation(const ServerConfig& config) {
  const google::protobuf::Descriptor& type = *config.GetDescriptor();
  for (const Range& range : kRanges) {
    const FieldDescriptor* const field = type.FindFieldByName(range.field);
    const double value = NumberOf(config, *field);
    if (value != 0.0 && !(value >= range.low && value <= range.high)) {
      return Violation{field, -1,
                       absl::StrCat(range.field, ": ", value, " is not between ", range.low,
                                    " and ", range.high)};
    }
  }
  if (config.session_time_to_live_seconds() > config.max_session_time_to_live_seconds() &&
      config.max_session_time_to_live_seconds() > 0.0) {
    return Violation{
        type.FindFieldByName("session_time_to_live_seconds"), -1,
        absl::StrCat("session_time_to_live_seconds: ", config.session_time_to_live_seconds(),
                     " is more than max_session_time_to_live_seconds, ",
                     config.max_session_time_to_live_seconds())};
  }
  const FieldDescriptor* const listen = type.FindFieldByName("listen");
  for (int i = 0; i < config.listen_size(); ++i) {
    const absl::Status status = CheckListenAddress(config.listen(i), config.insecure());
    if (!status.ok())
      return Violation{listen, i, absl::StrCat("listen: ", std::string(status.message()))};
  }
  if (!config.metrics_listen().empty() && config.metrics_listen() != "off") {
    const absl::Status status = CheckMetricsAddress(config.metrics_listen(), config.insecure());
    if (!status.ok()) {
      return Violation{type.FindFieldByName("metrics_listen"), -1,
                       absl::StrCat("metrics_listen: ", std::string(status.message()))};
    }
  }
  const FieldDescriptor* const models = type.FindFieldByName("models");
  for (int i = 0; i < config.models_size(); ++i) {
    if (config.models(i).spec().name().empty())
      return Violation{models, i, "models: spec.name is missing"};
    for (int j = 0; j < i; ++j) {
      if (config.models(i).spec().name() == config.models(j).spec().name()) {
        return Violation{
            models, i,
            absl::StrCat("models: there are two of the name ", config.models(i).spec().name())};
      }
    }
  }
  if (!attention::config::v1::LogLevel_IsValid(config.log_level())) {
    return Violation{type.FindFieldByName("log_level"), -1, "log_level: there is no such level"};
  }
  return std::nullopt;
}

}  // namespace

absl::StatusOr<ServerConfig> ReadConfigFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return InvalidField("config", absl::StrCat(path, ": can't be read"));
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  ServerConfig config;
  FirstError error;
  TextFormat::ParseInfoTree locations;
  TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  parser.WriteLocationsTo(&locations);
  if (!parser.ParseFromString(text, &config))
    return InvalidField("config", absl::StrCat(path, ":", error.text()));
  const std::optional<Violation> violation = FindViolation(config);
  if (!violation) return config;
  const int line = locations.GetLocation(violation->field, violation->index).line + 1;
  return InvalidField("config", absl::StrCat(path, ":", line, ": ", violation->text));
}

absl::Status CompleteConfig(ServerConfig& config) {
  if (config.listen_size() == 0) config.add_listen(kDefaultListen);
  if (config.metrics_listen().empty()) config.set_metrics_listen(kDefaultMetrics);
  if (config.max_message_bytes() == 0) config.set_max_message_bytes(std::uint64_t{64} << 20);
  if (config.max_inflight_bytes() == 0) config.set_max_inflight_bytes(std::uint64_t{1} << 30);
  if (config.max_workspace_bytes() == 0) config.set_max_workspace_bytes(std::uint64_t{2} << 30);
  if (config.memory_efficient_bytes() == 0) {
    config.set_memory_efficient_bytes(kDefaultMemoryBudget);
  }
  if (config.queue_capacity() == 0) config.set_queue_capacity(256);
  if (config.cache_bytes() == 0) config.set_cache_bytes(DescribeCpu().memory_bytes / 4);
  if (config.max_sessions() == 0) config.set_max_sessions(65536);
  if (config.session_time_to_live_seconds() == 0.0) config.set_session_time_to_live_seconds(3600.0);
  if (config.max_session_time_to_live_seconds() == 0.0) {
    config.set_max_session_time_to_live_seconds(
        std::max(7.0 * 24 * 3600, config.session_time_to_live_seconds()));
  }
  if (config.max_stream_requests() == 0) config.set_max_stream_requests(256);
  if (config.max_stream_bytes() == 0) config.set_max_stream_bytes(config.max_inflight_bytes() / 4);
  if (config.max_tokens() == 0) config.set_max_tokens(std::uint64_t{1} << 22);
  if (config.threads() == 0) config.set_threads(static_cast<std::uint32_t>(DescribeCpu().cores));
  if (config.executor_spin_microseconds() == 0) config.set_executor_spin_microseconds(20);
  if (config.drain_seconds() == 0.0) config.set_drain_seconds(30.0);
  if (config.benchmark_share() == 0.0) config.set_benchmark_share(kDefaultBenchmarkShare);
  if (config.benchmark_seconds() == 0.0) config.set_benchmark_seconds(kDefaultBenchmarkSeconds);
  if (config.benchmark_bytes() == 0) config.set_benchmark_bytes(kDefaultBenchmarkBytes);
  if (config.log_level() == attention::config::v1::LOG_LEVEL_UNSPECIFIED) {
    config.set_log_level(attention::config::v1::LOG_LEVEL_INFO);
  }
  const std::optional<Violation> violation = FindViolation(config);
  return violation ? InvalidField(violation->field->name(), violation->text) : absl::OkStatus();
}

}  // namespace attn::server
