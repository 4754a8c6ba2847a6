#include "server/listen_address.h"

#include <arpa/inet.h>
#include <sys/un.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn::server {
namespace {

constexpr char kUnixPrefix[] = "unix:";
constexpr std::size_t kUnixPrefixBytes = sizeof(kUnixPrefix) - 1;

// Names are not looked up: what they mean can change.
bool IsLoopback(const std::string& host) {
  if (host == "localhost") return true;
  in_addr v4{};
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6{};
  return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

absl::Status CheckTcpAddress(const std::string& address, bool insecure) {
  const std::size_t colon = address.rfind(':');
  std::string host = colon == std::string::npos ? "" : address.substr(0, colon);
  std::int32_t port = -1;
  const bool numeric =
      colon != std::string::npos && absl::SimpleAtoi(address.substr(colon + 1), &port);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']')
    host = host.substr(1, host.size() - 2);
  if (host.empty() || !numeric || port < 0 || port > 65535) {
    return InvalidField("listen",
                        absl::StrCat("'", address, "' is not host:port, [ipv6]:port or unix:PATH"));
  }
  if (insecure || IsLoopback(host)) return absl::OkStatus();
  return InvalidField("listen",
                      absl::StrCat("'", address,
                                   "' is not a loopback address, and the connection would not be "
                                   "encrypted: put a proxy in front, or allow it by --insecure"));
}

}  // namespace

bool IsUnixAddress(const std::string& address) {
  return address.compare(0, kUnixPrefixBytes, kUnixPrefix) == 0;
}

absl::Status CheckListenAddress(const std::string& address, bool insecure) {
  if (!IsUnixAddress(address)) return CheckTcpAddress(address, insecure);
  const std::size_t bytes = address.size() - kUnixPrefixBytes;
  if (bytes >= 1 && bytes < sizeof(sockaddr_un::sun_path)) return absl::OkStatus();
  return InvalidField("listen", absl::StrCat("'", address, "' has a path of ", bytes,
                                             " bytes, but a socket's has 1 to ",
                                             sizeof(sockaddr_un::sun_path) - 1));
}

absl::Status CheckMetricsAddress(const std::string& address, bool insecure) {
  return CheckTcpAddress(address, insecure);
}

std::string WithPort(const std::string& address, int port) {
  return absl::StrCat(address.substr(0, address.rfind(':') + 1), port);
}

}  // namespace attn::server
