// What attnctl's files share: the global options, how a command is run, and how it prints.
#pragma once

#include <google/protobuf/message.h>

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "client/cpp/attnd_client.h"

namespace CLI {
class App;
}

namespace attn::client {

// Filled while arguments are parsed; the chosen command puts itself into `run`, which main calls
// with a client of `address`. A status that it returns is printed as attnctl's one line of error.
struct CommandLine {
  std::string address = "127.0.0.1:7700";
  double timeout_seconds = 60;
  bool json = false;
  std::function<absl::Status(Client&)> run;
};

// Each adds the commands of one file to `app`. Both arguments outlive the parsing and the run.
void AddModelCommands(CLI::App& app, CommandLine& line);   // models, model, switch
void AddServerCommands(CLI::App& app, CommandLine& line);  // implementations, hardware, info
void AddSelectCommand(CLI::App& app, CommandLine& line);
void AddSessionCommands(CLI::App& app, CommandLine& line);  // sessions, session
void AddAttendCommand(CLI::App& app, CommandLine& line);
void AddBenchmarkCommand(CLI::App& app, CommandLine& line);

// A command whose arguments contradict each other: a usage error (exit status 2).
absl::Status UsageError(const std::string& message);
bool IsUsageError(const absl::Status& status);

// Protobuf's JSON with the proto's field names; fields at their default are there too.
std::string ToJson(const google::protobuf::Message& message);
std::string JsonString(const std::string& text);  // quoted and escaped

// To standard output, checked: a full disk is an error of the command.
absl::Status Print(const std::string& text);
inline absl::Status PrintJson(const google::protobuf::Message& message) {
  return Print(ToJson(message));
}

// "CODE: message (REASON; name=value, ...; try again in 1.5 s)" on one line.
std::string ErrorText(const absl::Status& status);

// An enum's value as people write it: ("MODALITY_LANGUAGE", "MODALITY_") -> "language".
std::string EnumText(const std::string& name, const std::string& prefix);

}  // namespace attn::client
