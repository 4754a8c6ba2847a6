// How a client is connected: transport security, keepalive, and gRPC's settings for both.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace grpc {
class Channel;
class ChannelCredentials;
}  // namespace grpc

namespace attn::client {

struct ChannelOptions {
  std::shared_ptr<grpc::ChannelCredentials> credentials = nullptr;  // null: plaintext
  // The name that the server's certificate must carry; empty: the address' host.
  std::string tls_server_name = {};

  // A call in progress whose connection has carried nothing for so long is probed; without an
  // answer to the probe the connection is given up, and the call is UNAVAILABLE. 0: never, so that
  // a peer that vanished without a word is noticed by deadlines alone. gRPC servers that were not
  // told otherwise take more than two probes without data within five minutes for an attack and
  // close the connection.
  double keepalive_seconds = 0;
  double keepalive_timeout_seconds = 20;
};

// PEM texts, not paths. With a certificate chain and its private key the client proves itself too
// (mutual TLS); one without the other is an error.
struct TlsOptions {
  std::string root_certificates = {};  // that vouch for the server; empty: the system's
  std::string certificate_chain = {};
  std::string private_key = {};
};

// INVALID_ARGUMENT for a text that is no PEM. Whether the certificates are any good shows when the
// connection is made: UNAVAILABLE.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> TlsCredentials(const TlsOptions& options);

std::shared_ptr<grpc::Channel> CreateChannel(const std::string& address,
                                             const ChannelOptions& options, int max_message_bytes);

}  // namespace attn::client
