// Every rpc's way in and out, whatever carries it: drain, budget, decoding, handler, encoding,
// metrics, each in one place. Without gRPC.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "absl/status/status.h"
#include "server/answer.h"
#include "server/call_context.h"
#include "server/codec.h"
#include "server/server_state.h"

namespace attn::server {

using RpcDone = std::function<void(absl::Status, Answer)>;

// One rpc: its name, and from its bytes to its answer. `done` is called exactly once.
struct Rpc {
  const char* name;
  std::function<void(ServerState&, const RequestBytes&, std::shared_ptr<CallContext>, RpcDone)>
      handle;
};

// The rpcs, as the services of the API name them.
namespace rpcs {
extern const Rpc kForward, kAttend, kGetServerInfo;
extern const Rpc kOpenSession, kForkSession, kGetSession, kCloseSession;
extern const Rpc kListModels, kLoadModel, kUnloadModel, kSwitchAttention, kListImplementations,
    kListSessions, kGetHardware;
// What a stream carries (server/request_stream.h); apart in the metrics.
extern const Rpc kStreamForward, kStreamAttend, kStreamOpen, kStreamFork, kStreamClose;
extern const Rpc kBenchmarkAttention;  // answers through CallContext::send
extern const Rpc kSelectAttention;
// UNIMPLEMENTED, each by its name.
extern const Rpc kRegisterSharedMemory, kUnregisterSharedMemory;
}  // namespace rpcs

class Dispatcher {
 public:
  explicit Dispatcher(ServerState& state) : state_(state) {}
  // Waits until every call has left: the last thing that an answered call does is to say so.
  ~Dispatcher();

  void Dispatch(const Rpc& rpc, RequestBytes bytes, std::shared_ptr<CallContext> context,
                RpcDone done);

  // From now on calls are UNAVAILABLE; those that are in go on.
  void BeginDrain();
  // Whether all calls were answered by then.
  bool WaitUntilIdle(std::chrono::steady_clock::time_point deadline);

 private:
  // Whether the call may come in.
  bool Enter();
  void Leave();

  ServerState& state_;
  std::mutex mutex_;
  std::condition_variable idle_;
  std::int64_t in_flight_ = 0;
  bool draining_ = false;
};

}  // namespace attn::server
