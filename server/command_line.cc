// The flags of attnd. Each one is a field of ServerConfig, and overrides it.
#include <google/protobuf/text_format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>
#include <vector>

#include "server/config.h"
#include "server/version.h"

namespace attn::server {
namespace {

struct Flags {
  std::vector<std::string> listen;
  std::string metrics_listen;
  std::vector<std::string> models;  // NAME=DIRECTORY
  std::string model_root;
  std::string config;
  std::string ready_file;
  std::string log_level;
  std::uint64_t max_message_bytes = 0;
  std::uint64_t max_inflight_bytes = 0;
  std::uint64_t max_workspace_bytes = 0;
  std::uint64_t memory_efficient_bytes = 0;
  std::uint64_t cache_bytes = 0;
  std::uint32_t max_sessions = 0;
  double session_time_to_live_seconds = 0.0;
  std::uint32_t queue_capacity = 0;
  std::uint32_t threads = 0;
  double drain_seconds = 0.0;
  double benchmark_share = 0.0;
  std::string timings_file;
  bool insecure = false;
  bool print_config = false;
};

void Declare(CLI::App& app, Flags& flags) {
  app.set_version_flag("--version", std::string("attnd ") + kVersion);
  app.add_option(
         "--listen", flags.listen,
         "Addresses to serve on, separated by commas: host:port (port 0: a free one), unix:PATH. "
         "Default: 127.0.0.1:7700")
      ->delimiter(',');
  app.add_option("--metrics-listen", flags.metrics_listen,
                 "Address of Prometheus' /metrics, or off. Default: 127.0.0.1:7701");
  app.add_option(
      "--model", flags.models,
      "A model to serve: NAME=DIRECTORY (config.json and *.safetensors). May be repeated");
  app.add_option("--model-root", flags.model_root,
                 "The directory under which LoadModel finds models. Default: none");
  app.add_option("--config", flags.config,
                 "A ServerConfig in text format (proto/attention/config/v1/config.proto)");
  app.add_option("--ready-file", flags.ready_file,
                 "Receives the real addresses as JSON once the server serves");
  app.add_flag("--insecure", flags.insecure, "Serve plaintext on addresses that are not loopback");
  app.add_option("--max-message-bytes", flags.max_message_bytes,
                 "Of one request or answer. Default: 64 MiB");
  app.add_option("--max-inflight-bytes", flags.max_inflight_bytes,
                 "Of all requests and answers together. Default: 1 GiB");
  app.add_option("--max-workspace-bytes", flags.max_workspace_bytes,
                 "Scratch memory of one execution. Default: 2 GiB");
  app.add_option("--memory-efficient-bytes", flags.memory_efficient_bytes,
                 "Scratch memory of one execution by memory_efficient. Default: 1 MiB");
  app.add_option("--cache-bytes", flags.cache_bytes,
                 "Of all sessions' keys and values. Default: a quarter of the memory");
  app.add_option("--max-sessions", flags.max_sessions, "Open at once. Default: 65536");
  app.add_option("--session-time-to-live-seconds", flags.session_time_to_live_seconds,
                 "After which an idle session ends, where it asked for no other. Default: 3600");
  app.add_option("--queue-capacity", flags.queue_capacity,
                 "Requests that may wait for a device. Default: 256");
  app.add_option("--threads", flags.threads,
                 "Cores of the CPU device. Default: those that this process may use");
  app.add_option("--drain-seconds", flags.drain_seconds,
                 "How long SIGTERM waits for running requests. Default: 30");
  app.add_option("--benchmark-share", flags.benchmark_share,
                 "Of the device's time that a benchmark may take. Default: 0.25");
  app.add_option("--timings-file", flags.timings_file,
                 "Keeps what benchmarks measured over restarts. Default: none");
  app.add_option("--log-level", flags.log_level, "debug, info, warning or error. Default: info")
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}));
  app.add_flag("--print-config", flags.print_config, "Print the complete configuration and exit");
}

// False with a message where a flag's value can't be what it should be.
bool Apply(const Flags& flags, ServerConfig& config) {
  if (!flags.listen.empty()) {
    config.clear_listen();
    for (const std::string& address : flags.listen) config.add_listen(address);
  }
  if (!flags.metrics_listen.empty()) config.set_metrics_listen(flags.metrics_listen);
  for (const std::string& model : flags.models) {
    const std::size_t equals = model.find('=');
    if (equals == std::string::npos || equals == 0 || equals + 1 == model.size()) {
      std::fprintf(stderr, "attnd: --model %s: must be NAME=DIRECTORY\n", model.c_str());
      return false;
    }
    auto* const entry = config.add_models();
    entry->mutable_spec()->set_name(model.substr(0, equals));
    entry->set_directory(model.substr(equals + 1));
  }
  if (!flags.model_root.empty()) config.set_model_root(flags.model_root);
  if (!flags.ready_file.empty()) config.set_ready_file(flags.ready_file);
  if (flags.insecure) config.set_insecure(true);
  if (flags.max_message_bytes != 0) config.set_max_message_bytes(flags.max_message_bytes);
  if (flags.max_inflight_bytes != 0) config.set_max_inflight_bytes(flags.max_inflight_bytes);
  if (flags.max_workspace_bytes != 0) config.set_max_workspace_bytes(flags.max_workspace_bytes);
  if (flags.memory_efficient_bytes != 0) {
    config.set_memory_efficient_bytes(flags.memory_efficient_bytes);
  }
  if (flags.cache_bytes != 0) config.set_cache_bytes(flags.cache_bytes);
  if (flags.max_sessions != 0) config.set_max_sessions(flags.max_sessions);
  if (flags.session_time_to_live_seconds != 0.0) {
    config.set_session_time_to_live_seconds(flags.session_time_to_live_seconds);
  }
  if (flags.queue_capacity != 0) config.set_queue_capacity(flags.queue_capacity);
  if (flags.threads != 0) config.set_threads(flags.threads);
  if (flags.drain_seconds != 0.0) config.set_drain_seconds(flags.drain_seconds);
  if (flags.benchmark_share != 0.0) config.set_benchmark_share(flags.benchmark_share);
  if (!flags.timings_file.empty()) config.set_timings_file(flags.timings_file);
  if (flags.log_level == "debug") config.set_log_level(attention::config::v1::LOG_LEVEL_DEBUG);
  if (flags.log_level == "info") config.set_log_level(attention::config::v1::LOG_LEVEL_INFO);
  if (flags.log_level == "warning") config.set_log_level(attention::config::v1::LOG_LEVEL_WARNING);
  if (flags.log_level == "error") config.set_log_level(attention::config::v1::LOG_LEVEL_ERROR);
  return true;
}

}  // namespace

CommandLine ParseCommandLine(int argc, char** argv) {
  constexpr int kUsageError = 2;
  CommandLine line;
  Flags flags;
  CLI::App app("attnd: hosts the attention of models and executes it over gRPC");
  app.footer(
      "Example: attnd --model minilm=./all-MiniLM-L6-v2 --listen "
      "127.0.0.1:7700,unix:/run/attnd.sock");
  Declare(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);
    line.exit_code = code == 0 ? 0 : kUsageError;
    return line;
  }
  if (!flags.config.empty()) {
    absl::StatusOr<ServerConfig> config = ReadConfigFile(flags.config);
    if (!config.ok()) {
      std::fprintf(stderr, "attnd: %s\n", std::string(config.status().message()).c_str());
      line.exit_code = kUsageError;
      return line;
    }
    line.config = *std::move(config);
  }
  if (!Apply(flags, line.config)) {
    line.exit_code = kUsageError;
    return line;
  }
  const absl::Status status = CompleteConfig(line.config);
  if (!status.ok()) {
    std::fprintf(stderr, "attnd: %s\n", std::string(status.message()).c_str());
    line.exit_code = kUsageError;
  } else if (flags.print_config) {
    std::string text;
    google::protobuf::TextFormat::PrintToString(line.config, &text);
    std::fputs(text.c_str(), stdout);
    line.exit_code = 0;
  }
  return line;
}

}  // namespace attn::server
