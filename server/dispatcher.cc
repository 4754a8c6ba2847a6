#include "server/dispatcher.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/checked_math.h"
#include "core/error.h"
#include "server/admin_handlers.h"
#include "server/attention_handlers.h"
#include "server/benchmark_handlers.h"
#include "server/select_handlers.h"
#include "server/session_handlers.h"

namespace attn::server {
namespace {

// A parsed message is this many times larger than its bytes at most, tensors aside (WireLimits
// bounds the rest).
constexpr std::uint64_t kRequestCopies = 2;
// The control plane's messages hold no tensors; what they describe is kept.
constexpr std::uint64_t kMaxControlBytes = std::uint64_t{4} << 20;
// Control-plane requests that may wait for the background executor.
constexpr int kMaxBackgroundCalls = 16;

void Finish(absl::StatusOr<Answer> answer, const RpcDone& done) {
  if (!answer.ok()) return done(answer.status(), {});
  done(absl::OkStatus(), *std::move(answer));
}

void EncodeDone(absl::StatusOr<AttentionAnswer> answer, Answer (*encode)(const AttentionAnswer&),
                const RpcDone& done) {
  if (!answer.ok()) return done(answer.status(), {});
  Finish(GuardMemory([&] { return absl::StatusOr<Answer>(encode(*answer)); }), done);
}

void DispatchForward(ServerState& state, const RequestBytes& bytes,
                     std::shared_ptr<CallContext> context, RpcDone done) {
  absl::StatusOr<ForwardCall> call = GuardMemory([&] { return DecodeForward(bytes); });
  if (!call.ok()) return done(call.status(), {});
  HandleForward(state, *std::move(call), std::move(context),
                [done = std::move(done)](absl::StatusOr<AttentionAnswer> answer) {
                  EncodeDone(std::move(answer), &EncodeForward, done);
                });
}

void DispatchAttend(ServerState& state, const RequestBytes& bytes,
                    std::shared_ptr<CallContext> context, RpcDone done) {
  absl::StatusOr<AttendCall> call = GuardMemory([&] { return DecodeAttend(bytes); });
  if (!call.ok()) return done(call.status(), {});
  HandleAttend(state, *std::move(call), std::move(context),
               [done = std::move(done)](absl::StatusOr<AttentionAnswer> answer) {
                 EncodeDone(std::move(answer), &EncodeAttend, done);
               });
}

// Its answers go through the context; what is left for the end is the status.
void DispatchBenchmark(ServerState& state, const RequestBytes& bytes,
                       std::shared_ptr<CallContext> context, RpcDone done) {
  absl::StatusOr<BenchmarkCall> call = GuardMemory([&] { return DecodeBenchmark(bytes); });
  if (!call.ok()) return done(call.status(), {});
  HandleBenchmarkAttention(
      state, *std::move(call), std::move(context),
      [done = std::move(done)](absl::Status status) { done(std::move(status), {}); });
}

absl::Status CheckControlMessage(const RequestBytes& bytes) {
  if (bytes.size <= kMaxControlBytes) return absl::OkStatus();
  return MakeError(absl::StatusCode::kInvalidArgument, "REQUEST_TOO_LARGE",
                   absl::StrCat("the request has ", bytes.size, " bytes, more than the ",
                                kMaxControlBytes, " that a control-plane request may have"));
}

template <typename Request>
absl::StatusOr<std::shared_ptr<Request>> ParseControlMessage(const RequestBytes& bytes) {
  return GuardMemory([&]() -> absl::StatusOr<std::shared_ptr<Request>> {
    ATTN_RETURN_IF_ERROR(CheckControlMessage(bytes));
    auto request = std::make_shared<Request>();
    ATTN_RETURN_IF_ERROR(ParseMessage(bytes, *request));
    return request;
  });
}

template <typename Request, typename Response>
absl::StatusOr<Answer> HandleMessage(absl::Status (*handler)(ServerState&, const Request&,
                                                             Response&),
                                     ServerState& state, const Request& request) {
  return GuardMemory([&]() -> absl::StatusOr<Answer> {
    Response response;
    ATTN_RETURN_IF_ERROR(handler(state, request, response));
    return EncodeMessage(response);
  });
}

// An rpc whose handler is a function of messages.
template <typename Request, typename Response>
Rpc MessageRpc(const char* name, absl::Status (*handler)(ServerState&, const Request&, Response&)) {
  return {name, [handler](ServerState& state, const RequestBytes& bytes,
                          std::shared_ptr<CallContext>, RpcDone done) {
            const auto request = ParseControlMessage<Request>(bytes);
            if (!request.ok()) return done(request.status(), {});
            Finish(HandleMessage(handler, state, **request), done);
          }};
}

// The same on the background executor, for work that takes longer than a caller's thread may.
template <typename Request, typename Response>
Rpc BackgroundRpc(const char* name,
                  absl::Status (*handler)(ServerState&, const Request&, Response&)) {
  const auto waiting = std::make_shared<std::atomic<int>>(0);
  return {name, [handler, waiting](ServerState& state, const RequestBytes& bytes,
                                   std::shared_ptr<CallContext> context, RpcDone done) {
            const auto request = ParseControlMessage<Request>(bytes);
            if (!request.ok()) return done(request.status(), {});
            if (waiting->fetch_add(1) >= kMaxBackgroundCalls) {
              waiting->fetch_sub(1);
              absl::Status busy = MakeError(absl::StatusCode::kResourceExhausted, "BUSY",
                                            "too many requests of this kind are waiting");
              SetRetryDelay(busy, 1.0);
              return done(std::move(busy), {});
            }
            state.background().Post(
                [handler, waiting, &state, held = *request, context, done = std::move(done)] {
                  waiting->fetch_sub(1);
                  absl::Status wanted = context->Wanted();
                  if (!wanted.ok()) return done(std::move(wanted), {});
                  Finish(HandleMessage(handler, state, *held), done);
                });
          }};
}

// The same for a handler that answers later.
template <typename Request, typename Response>
Rpc DeferredRpc(const char* name,
                void (*handler)(ServerState&, const Request&, std::shared_ptr<CallContext>,
                                ResponseDone<Response>)) {
  return {name, [handler](ServerState& state, const RequestBytes& bytes,
                          std::shared_ptr<CallContext> context, RpcDone done) {
            const auto request = ParseControlMessage<Request>(bytes);
            if (!request.ok()) return done(request.status(), {});
            handler(state, **request, std::move(context),
                    [done = std::move(done)](absl::StatusOr<Response> response) {
                      if (!response.ok()) return done(response.status(), {});
                      Finish(GuardMemory(
                                 [&] { return absl::StatusOr<Answer>(EncodeMessage(*response)); }),
                             done);
                    });
          }};
}

Rpc UnimplementedRpc(const char* name) {
  return {name,
          [name](ServerState&, const RequestBytes&, std::shared_ptr<CallContext>, RpcDone done) {
            done(MakeError(absl::StatusCode::kUnimplemented, "RPC_UNIMPLEMENTED",
                           absl::StrCat(name, " is not supported by this server")),
                 {});
          }};
}

}  // namespace

namespace rpcs {
const Rpc kForward{"Forward", &DispatchForward};
const Rpc kAttend{"Attend", &DispatchAttend};
const Rpc kGetServerInfo = MessageRpc("GetServerInfo", &HandleGetServerInfo);
const Rpc kListModels = MessageRpc("ListModels", &HandleListModels);
const Rpc kLoadModel = BackgroundRpc("LoadModel", &HandleLoadModel);
const Rpc kUnloadModel = MessageRpc("UnloadModel", &HandleUnloadModel);
const Rpc kSwitchAttention = MessageRpc("SwitchAttention", &HandleSwitchAttention);
const Rpc kListImplementations = MessageRpc("ListImplementations", &HandleListImplementations);
const Rpc kGetHardware = MessageRpc("GetHardware", &HandleGetHardware);
const Rpc kOpenSession = MessageRpc("OpenSession", &HandleOpenSession);
const Rpc kForkSession = DeferredRpc("ForkSession", &HandleForkSession);
const Rpc kGetSession = MessageRpc("GetSession", &HandleGetSession);
const Rpc kCloseSession = DeferredRpc("CloseSession", &HandleCloseSession);
const Rpc kListSessions = MessageRpc("ListSessions", &HandleListSessions);
const Rpc kRegisterSharedMemory = UnimplementedRpc("RegisterSharedMemory");
const Rpc kUnregisterSharedMemory = UnimplementedRpc("UnregisterSharedMemory");
const Rpc kBenchmarkAttention{"BenchmarkAttention", &DispatchBenchmark};
const Rpc kSelectAttention = MessageRpc("SelectAttention", &HandleSelectAttention);
const Rpc kStreamForward{"Stream.Forward", &DispatchForward};
const Rpc kStreamAttend{"Stream.Attend", &DispatchAttend};
const Rpc kStreamOpen = MessageRpc("Stream.OpenSession", &HandleOpenSession);
const Rpc kStreamFork = DeferredRpc("Stream.ForkSession", &HandleForkSession);
const Rpc kStreamClose = DeferredRpc("Stream.CloseSession", &HandleCloseSession);
}  // namespace rpcs

Dispatcher::~Dispatcher() {
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [this] { return in_flight_ == 0; });
}

void Dispatcher::Dispatch(const Rpc& rpc, RequestBytes bytes, std::shared_ptr<CallContext> context,
                          RpcDone done) {
  state_.metrics().Start(rpc.name, bytes.size);
  const bool entered = Enter();
  RpcDone finish = [this, &rpc, entered, context, done = std::move(done)](absl::Status status,
                                                                          Answer answer) {
    const std::uint64_t sent = answer.bytes();
    state_.metrics().Finish(rpc.name, *context, absl::StatusCodeToString(status.code()), sent);
    done(std::move(status), std::move(answer));
    if (entered) Leave();
  };
  if (!entered) {
    absl::Status draining =
        MakeError(absl::StatusCode::kUnavailable, "DRAINING", "the server is shutting down");
    return finish(std::move(draining), {});
  }
  absl::StatusOr<MemoryBudget::Reservation> reserved =
      state_.budget().Reserve(SaturatingMultiply(bytes.size, kRequestCopies));
  if (!reserved.ok()) return finish(reserved.status(), {});
  context->Hold(*std::move(reserved));
  rpc.handle(state_, bytes, std::move(context), std::move(finish));
}

bool Dispatcher::Enter() {
  std::lock_guard lock(mutex_);
  if (draining_) return false;
  ++in_flight_;
  return true;
}

void Dispatcher::Leave() {
  std::lock_guard lock(mutex_);
  if (--in_flight_ == 0) idle_.notify_all();
}

void Dispatcher::BeginDrain() {
  std::lock_guard lock(mutex_);
  draining_ = true;
}

bool Dispatcher::WaitUntilIdle(std::chrono::steady_clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  return idle_.wait_until(lock, deadline, [this] { return in_flight_ == 0; });
}

}  // namespace attn::server
