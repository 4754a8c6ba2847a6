// attnctl: the control of an attnd server, and attention on .npy files, from a shell.
// Exit status: 0; 1 where the call failed; 2 for a usage error; 130 when interrupted.
#include "client/cpp/attnctl.h"

#include <pthread.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <exception>
#include <limits>
#include <memory>
#include <string>
#include <thread>

namespace attn::client {
namespace {

constexpr int kFailed = 1;
constexpr int kUsage = 2;
constexpr int kInterrupted = 130;  // 128 + SIGINT, as shells have it

// The signals that cancel, blocked in this thread and in those that it starts from here on: called
// before gRPC has any, or one of gRPC's threads would be killed by them, and the process with it.
sigset_t BlockInterrupts() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return signals;
}

// While one lives, Ctrl-C and SIGTERM cancel the client's calls, which then end in order; a second
// one, or one while no call runs, ends the process. A thread waits for the signals, because gRPC's
// cancellation takes locks and may not be called from a signal handler.
class Interrupts {
 public:
  Interrupts(const sigset_t& blocked, Client& client) : signals_(blocked) {
    thread_ = std::thread([this, &client] {
      int signal = 0;
      while (sigwait(&signals_, &signal) == 0 && !finished_) {
        if (interrupted_.exchange(true) || client.CancelCalls() == 0) _exit(kInterrupted);
      }
    });
  }
  ~Interrupts() {
    finished_ = true;
    pthread_kill(thread_.native_handle(), SIGINT);
    thread_.join();
  }
  bool interrupted() const { return interrupted_; }

 private:
  const sigset_t signals_;
  std::atomic<bool> finished_ = false;
  std::atomic<bool> interrupted_ = false;
  std::thread thread_;
};

int ReportUsage(const std::string& message, const std::string& command) {
  std::fprintf(stderr, "attnctl: %s\nRun '%s --help' for its arguments.\n", message.c_str(),
               command.c_str());
  return kUsage;
}

// "attnctl model load" for the innermost command that was named.
std::string CommandName(const CLI::App& app) {
  const CLI::App* command = &app;
  std::string name = app.get_name();
  while (!command->get_subcommands().empty()) {
    command = command->get_subcommands().front();
    name += " " + command->get_name();
  }
  return name;
}

int Report(const absl::Status& status, const CLI::App& app, const CommandLine& line) {
  if (IsUsageError(status)) return ReportUsage(std::string(status.message()), CommandName(app));
  std::fprintf(stderr, "attnctl: %s\n", ErrorText(status).c_str());
  if (absl::IsUnavailable(status) && ErrorOf(status).reason.empty()) {
    std::fprintf(stderr,
                 "Is a server running there? Start one with 'attnd --listen %s', or give another "
                 "--address.\n",
                 line.address.c_str());
  }
  return kFailed;
}

int Run(const CLI::App& app, const CommandLine& line) {
  ClientOptions options;
  options.timeout_seconds = line.timeout_seconds;
  options.max_message_bytes = std::numeric_limits<int>::max();  // the server's limit is the one
  const sigset_t signals = BlockInterrupts();
  absl::StatusOr<std::unique_ptr<Client>> client = Client::Create(line.address, options);
  if (!client.ok()) {
    return ReportUsage(std::string(client.status().message()), CommandName(app));
  }
  Interrupts interrupts(signals, **client);
  const absl::Status status = line.run(**client);
  if (status.ok()) return 0;
  const int exit_status = Report(status, app, line);
  return interrupts.interrupted() ? kInterrupted : exit_status;
}

int Main(int argc, char** argv) {
  CLI::App app(
      "Controls an attnd server: models, sessions, implementations, hardware; computes attention "
      "on .npy files.",
      "attnctl");
  CommandLine line;
  app.fallthrough();
  app.require_subcommand(1);
  app.set_version_flag("--version", std::string("attnctl ") + ATTNCTL_VERSION);
  app.add_option("--address", line.address, "The server: HOST:PORT or unix:PATH")
      ->type_name("ADDRESS")
      ->envname("ATTND_ADDRESS")
      ->capture_default_str();
  app.add_option("--timeout", line.timeout_seconds, "Until a call is given up; 0: never")
      ->type_name("SECONDS")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_flag("--json", line.json, "Print JSON, with the API's field names, instead of tables");
  // Commands inherit the footer that stands when they are added.
  app.footer("--address, --timeout and --json may be given here too: see 'attnctl --help'.");
  AddModelCommands(app, line);
  AddSelectCommand(app, line);
  AddSessionCommands(app, line);
  AddServerCommands(app, line);
  AddAttendCommand(app, line);
  AddBenchmarkCommand(app, line);
  app.footer("'attnctl COMMAND --help' tells a command's arguments.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    // CLI11 misses the command before it looks at the word that stands in its place.
    const bool unknown = app.get_subcommands().empty() && !app.remaining().empty();
    return ReportUsage(unknown ? "unknown command '" + app.remaining().front() + "'" : error.what(),
                       CommandName(app));
  }
  return Run(app, line);
}

}  // namespace
}  // namespace attn::client

int main(int argc, char** argv) {
  try {
    return attn::client::Main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attnctl: INTERNAL: %s\n", error.what());
    return 1;
  }
}
