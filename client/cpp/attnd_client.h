// A client of one attnd server: the rpcs of both services as functions that block, with deadlines,
// cancellation, and errors that carry what the server told programs. session.h has sessions as
// objects, calls.h calls and tensors without protobuf.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "attention/v1/admin.pb.h"
#include "attention/v1/attention.pb.h"
#include "client/cpp/channel.h"

namespace attn::client {

class Session;
struct SessionOptions;

struct ClientOptions {
  double timeout_seconds = 60;               // of each call; 0: no deadline
  int max_message_bytes = 64 * 1024 * 1024;  // of a request or an answer; the server has limits too
  ChannelOptions channel = {};
};

struct CallOptions {
  std::optional<double> timeout_seconds = std::nullopt;  // unset: the client's; 0: no deadline
};

// What a failed call told, taken apart. docs/errors.md lists the reasons.
struct ClientError {
  absl::StatusCode code = absl::StatusCode::kOk;
  std::string message;
  std::string reason;              // empty where the failure did not come from attnd itself
  double retry_delay_seconds = 0;  // 0: a retry will not help by waiting
  std::map<std::string, std::string> details;
  // attnd answered, and nothing was changed. Otherwise gRPC or this library gave the call up: its
  // answer may be what was lost.
  bool answered = false;
};

// Of a status that a Client returned. The server's Error travels inside it, as a payload, so that
// absl::StatusOr is all that callers pass on.
ClientError ErrorOf(const absl::Status& status);

// OK for "host:port", "[ipv6]:port" and "unix:PATH". gRPC itself takes a missing port for 443.
absl::Status CheckAddress(const std::string& address);

// Any number of threads may call; each call blocks its own. Connects when first needed, and again
// after the connection was lost; UNAVAILABLE says that the server was not reached. Functions of
// messages are not retried; a Session's are. A call past its deadline is DEADLINE_EXCEEDED; what a
// message limit forbids is INVALID_ARGUMENT before it is sent.
class Client {
 public:
  // Fails for a malformed address only.
  static absl::StatusOr<std::unique_ptr<Client>> Create(const std::string& address,
                                                        const ClientOptions& options = {});
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  const std::string& address() const;

  // Ends the calls in progress with CANCELLED, those too that wait to be retried; how many they
  // were. From any thread, but not from a signal handler.
  int CancelCalls();

  // The one way to a session that retries safely: see session.h.
  absl::StatusOr<Session> OpenSession(const SessionOptions& options);

  absl::StatusOr<attention::v1::ForwardResponse> Forward(
      const attention::v1::ForwardRequest& request, const CallOptions& options = {});
  absl::StatusOr<attention::v1::AttendResponse> Attend(const attention::v1::AttendRequest& request,
                                                       const CallOptions& options = {});
  absl::StatusOr<attention::v1::OpenSessionResponse> OpenSession(
      const attention::v1::OpenSessionRequest& request, const CallOptions& options = {});
  absl::StatusOr<attention::v1::ForkSessionResponse> ForkSession(
      const attention::v1::ForkSessionRequest& request, const CallOptions& options = {});
  absl::StatusOr<attention::v1::GetSessionResponse> GetSession(
      const attention::v1::GetSessionRequest& request, const CallOptions& options = {});
  absl::StatusOr<attention::v1::CloseSessionResponse> CloseSession(
      const attention::v1::CloseSessionRequest& request, const CallOptions& options = {});
  absl::StatusOr<attention::v1::GetServerInfoResponse> GetServerInfo();

  absl::StatusOr<attention::v1::ListModelsResponse> ListModels();
  absl::StatusOr<attention::v1::LoadModelResponse> LoadModel(
      const attention::v1::LoadModelRequest& request);
  absl::StatusOr<attention::v1::UnloadModelResponse> UnloadModel(
      const attention::v1::UnloadModelRequest& request);
  absl::StatusOr<attention::v1::SwitchAttentionResponse> SwitchAttention(
      const attention::v1::SwitchAttentionRequest& request);
  // Each event is given to `take` as it comes; OK once the benchmark has ended.
  absl::Status BenchmarkAttention(
      const attention::v1::BenchmarkAttentionRequest& request,
      const std::function<void(const attention::v1::BenchmarkAttentionResponse&)>& take,
      const CallOptions& options = {});
  absl::StatusOr<attention::v1::SelectAttentionResponse> SelectAttention(
      const attention::v1::SelectAttentionRequest& request);
  absl::StatusOr<attention::v1::ListImplementationsResponse> ListImplementations();
  absl::StatusOr<attention::v1::GetHardwareResponse> GetHardware();
  // One page; the request's page_token says which.
  absl::StatusOr<attention::v1::ListSessionsResponse> ListSessions(
      const attention::v1::ListSessionsRequest& request);
  // All pages as one. Sessions that open or close meanwhile may be missing.
  absl::StatusOr<attention::v1::ListSessionsResponse> ListAllSessions(const std::string& model);

 private:
  friend class Session;
  class Impl;
  explicit Client(std::shared_ptr<Impl> impl);

  std::shared_ptr<Impl> impl_;  // sessions share it, so that they may outlive the client
};

}  // namespace attn::client
