#include "server/run_server.h"

#include <google/protobuf/stubs/logging.h>
#include <limits.h>
#include <signal.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <string>
#include <thread>

#include "absl/strings/str_join.h"
#include "kernels/cpu/isa.h"
#include "server/config.h"
#include "server/server.h"
#include "server/version.h"

namespace attn::server {
namespace {

// LibTorch's OpenMP threads spin for milliseconds after each region and starve gRPC's on the same
// cores; libgomp reads its settings when it is loaded, which is before main: so they are set and
// the program is started again.
void UsePassiveOpenMp(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  setenv("OMP_WAIT_POLICY", "passive", 1);
  // By its own path: started as /proc/self/exe it would be called "exe" in process lists.
  char path[PATH_MAX] = {};
  if (readlink("/proc/self/exe", path, sizeof(path) - 1) > 0) execv(path, argv);
  // Where that is not allowed, serving goes on, only slower.
}

void SetUpLog(attention::config::v1::LogLevel level) {
  auto logger = spdlog::stderr_logger_mt("attnd");
  logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e%z %l %v");
  switch (level) {
    case attention::config::v1::LOG_LEVEL_DEBUG:
      logger->set_level(spdlog::level::debug);
      break;
    case attention::config::v1::LOG_LEVEL_WARNING:
      logger->set_level(spdlog::level::warn);
      break;
    case attention::config::v1::LOG_LEVEL_ERROR:
      logger->set_level(spdlog::level::err);
      break;
    default:
      logger->set_level(spdlog::level::info);
      break;
  }
  spdlog::set_default_logger(std::move(logger));
}

// The first signal while serving asks for a drain; any other one, before or after it, ends the
// process at once.
class Signals {
 public:
  // Before any thread is started: they inherit the mask, so that signals arrive where they are
  // waited for.
  Signals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGTERM);
    sigaddset(&set_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    signal(SIGPIPE, SIG_IGN);
    std::thread([this] { Receive(); }).detach();
  }

  // Returns the signal that asks for a drain.
  int WaitForDrain() {
    serving_.store(true);
    return drain_.get_future().get();
  }

 private:
  void Receive() {
    while (true) {
      int received = 0;
      sigwait(&set_, &received);
      if (!serving_.exchange(false)) std::_Exit(128 + received);
      drain_.set_value(received);
    }
  }

  sigset_t set_;
  std::atomic<bool> serving_{false};
  std::promise<int> drain_;
};

}  // namespace

int RunServer(int argc, char** argv, ImplementationTable table) {
  const CommandLine line = ParseCommandLine(argc, argv);
  if (line.exit_code) return *line.exit_code;
  UsePassiveOpenMp(argv);
  SetUpLog(line.config.log_level());
  if (kernels::cpu::ForcedIsaError() != nullptr) {
    std::fprintf(stderr, "attnd: %s\n", kernels::cpu::ForcedIsaError());
    return 2;
  }
  static Signals signals;  // its thread never ends

  // Protobuf reports what can't be parsed to stderr: callers are told by a status, and could fill
  // the log.
  google::protobuf::SetLogHandler(nullptr);
  spdlog::info("attnd {} starts: {} threads, cpu/{}", kVersion, line.config.threads(),
               kernels::cpu::ActiveIsa().name);
  auto server = Server::Start(line.config, table);
  if (!server.ok()) {
    std::fprintf(stderr, "attnd: %s\n", std::string(server.status().message()).c_str());
    return 1;
  }
  spdlog::info("serves on {}; metrics on {}", absl::StrJoin((*server)->listen(), ", "),
               (*server)->metrics().empty() ? "no address" : (*server)->metrics() + "/metrics");

  // Never destroyed: the metrics endpoint's end takes two seconds, and the process is over anyway.
  static Server* const running = server->release();

  const int received = signals.WaitForDrain();
  spdlog::info("drains: signal {}; a second one ends the server at once", received);
  const bool idle = running->Drain();
  spdlog::info(idle ? "all requests were answered"
                    : "requests were cut off by the end of the drain time");
  spdlog::shutdown();
  const int status = idle ? 0 : 1;
#ifndef __SANITIZE_ADDRESS__  // which looks for leaks on the way out
  // Static objects stay as they are: threads may still look at them.
  std::fflush(nullptr);
  std::_Exit(status);
#endif
  return status;
}

}  // namespace attn::server
