#include "client/cpp/channel.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace attn::client {
namespace {

// The first pause after a failed connection, and the longest. gRPC's own are 1 s and 2 min: longer
// than a server's restart, and than all retries of a call together.
constexpr int kFirstReconnectMs = 100;
constexpr int kLastReconnectMs = 2000;

absl::Status CheckPem(const char* field, const std::string& text) {
  if (text.empty() || absl::StrContains(text, "-----BEGIN ")) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " is not PEM: it has no line that starts with -----BEGIN"));
}

int Milliseconds(double seconds) {
  constexpr double kLargest = std::numeric_limits<int>::max();
  return static_cast<int>(std::clamp(seconds * 1000, 1.0, kLargest));
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> TlsCredentials(
    const TlsOptions& options) {
  if (options.certificate_chain.empty() != options.private_key.empty()) {
    return absl::InvalidArgumentError(
        "certificate_chain and private_key are given together or not at all");
  }
  for (const absl::Status& status : {CheckPem("root_certificates", options.root_certificates),
                                     CheckPem("certificate_chain", options.certificate_chain),
                                     CheckPem("private_key", options.private_key)}) {
    if (!status.ok()) return status;
  }
  grpc::SslCredentialsOptions ssl;
  ssl.pem_root_certs = options.root_certificates;
  ssl.pem_cert_chain = options.certificate_chain;
  ssl.pem_private_key = options.private_key;
  return grpc::SslCredentials(ssl);
}

std::shared_ptr<grpc::Channel> CreateChannel(const std::string& address,
                                             const ChannelOptions& options, int max_message_bytes) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(max_message_bytes);
  arguments.SetMaxSendMessageSize(max_message_bytes);
  // http_proxy in the environment is meant for the web, not for this.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kFirstReconnectMs);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kLastReconnectMs);
  if (!options.tls_server_name.empty()) {
    arguments.SetSslTargetNameOverride(options.tls_server_name);
  }
  if (options.keepalive_seconds > 0) {
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, Milliseconds(options.keepalive_seconds));
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                     Milliseconds(options.keepalive_timeout_seconds));
    // Otherwise gRPC stops after two probes without data, and a long call is left alone.
    arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  }
  return grpc::CreateCustomChannel(
      address, options.credentials ? options.credentials : grpc::InsecureChannelCredentials(),
      arguments);
}

}  // namespace attn::client
