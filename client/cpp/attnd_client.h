// A client of one attnd server: the rpcs of both services as functions that block, with deadlines,
// cancellation, and errors that carry what the server told programs.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "attention/v1/admin.pb.h"
#include "attention/v1/attention.pb.h"

namespace grpc {
class ChannelCredentials;
}

namespace attn::client {

struct ClientOptions {
  double timeout_seconds = 60;               // of each call; 0: no deadline
  int max_message_bytes = 64 * 1024 * 1024;  // of a request or an answer; the server has limits too
  std::shared_ptr<grpc::ChannelCredentials> credentials = nullptr;  // null: plaintext
};

// What a failed call told, taken apart. docs/errors.md lists the reasons.
struct ClientError {
  absl::StatusCode code = absl::StatusCode::kOk;
  std::string message;
  std::string reason;              // empty where the failure did not come from attnd itself
  double retry_delay_seconds = 0;  // 0: a retry will not help by waiting
  std::map<std::string, std::string> details;
};

// Of a status that a Client returned. The server's Error travels inside it, as a payload, so that
// absl::StatusOr is all that callers pass on.
ClientError ErrorOf(const absl::Status& status);

// OK for "host:port", "[ipv6]:port" and "unix:PATH". gRPC itself takes a missing port for 443.
absl::Status CheckAddress(const std::string& address);

// Any number of threads may call; each call blocks its own. Connects when first needed, and again
// after the connection was lost; UNAVAILABLE says that the server was not reached. Nothing is
// retried. A call past its deadline is DEADLINE_EXCEEDED; what a message limit forbids is
// INVALID_ARGUMENT before it is sent.
class Client {
 public:
  // Fails for a malformed address only.
  static absl::StatusOr<std::unique_ptr<Client>> Create(const std::string& address,
                                                        const ClientOptions& options = {});
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  const std::string& address() const;

  // Ends the calls in progress with CANCELLED; how many they were. From any thread, but not from a
  // signal handler.
  int CancelCalls();

  absl::StatusOr<attention::v1::ForwardResponse> Forward(
      const attention::v1::ForwardRequest& request);
  absl::StatusOr<attention::v1::AttendResponse> Attend(const attention::v1::AttendRequest& request);
  absl::StatusOr<attention::v1::GetServerInfoResponse> GetServerInfo();

  absl::StatusOr<attention::v1::ListModelsResponse> ListModels();
  absl::StatusOr<attention::v1::LoadModelResponse> LoadModel(
      const attention::v1::LoadModelRequest& request);
  absl::StatusOr<attention::v1::UnloadModelResponse> UnloadModel(
      const attention::v1::UnloadModelRequest& request);
  absl::StatusOr<attention::v1::SwitchAttentionResponse> SwitchAttention(
      const attention::v1::SwitchAttentionRequest& request);
  absl::StatusOr<attention::v1::ListImplementationsResponse> ListImplementations();
  absl::StatusOr<attention::v1::GetHardwareResponse> GetHardware();

 private:
  class Impl;
  explicit Client(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

}  // namespace attn::client
