// Addresses that the server listens on, and which of them may be plaintext.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace attn::server {

// host:port, [ipv6]:port or unix:PATH. Without `insecure` a TCP address must be a loopback one:
// there is no encryption.
absl::Status CheckListenAddress(const std::string& address, bool insecure);

// host:port of the metrics' HTTP server.
absl::Status CheckMetricsAddress(const std::string& address, bool insecure);

// The same address with the port that was really taken.
std::string WithPort(const std::string& address, int port);

bool IsUnixAddress(const std::string& address);

}  // namespace attn::server
