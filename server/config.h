// Where the server's settings come from: the file that --config names, flags over it, defaults
// under it.
#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "attention/config/v1/config.pb.h"

namespace attn::server {

using ServerConfig = attention::config::v1::ServerConfig;

struct CommandLine {
  ServerConfig config;  // complete and checked
  std::optional<int>
      exit_code;  // --help, --version, --print-config or a wrong flag: it was dealt with
};

CommandLine ParseCommandLine(int argc, char** argv);

// Reads a configuration in text format; a wrong one is INVALID_ARGUMENT with "FILE:LINE: FIELD:
// rule".
absl::StatusOr<ServerConfig> ReadConfigFile(const std::string& path);

// Defaults for what is unset, then the rules that hold wherever a value came from.
absl::Status CompleteConfig(ServerConfig& config);

}  // namespace attn::server
