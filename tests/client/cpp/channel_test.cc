// Connections that prove who is at their ends.
#include "client/cpp/channel.h"

#include <arpa/inet.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "client/cpp/attnd_client.h"
#include "tests/client/cpp/fake_sessions.h"
#include "tests/client/cpp/test_certificate.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;

// A server with the test's certificate, which asks its clients for theirs where it is told to.
class TlsServer {
 public:
  explicit TlsServer(bool asks_for_clients) {
    grpc::SslServerCredentialsOptions ssl(
        asks_for_clients ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                         : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
    ssl.pem_root_certs = kTestCertificate;
    ssl.pem_key_cert_pairs.push_back({kTestKey, kTestCertificate});
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::SslServerCredentials(ssl), &port_);
    builder.RegisterService(&fake_);
    server_ = builder.BuildAndStart();
  }
  ~TlsServer() { server_->Shutdown(); }

  absl::StatusCode Open(const ChannelOptions& channel) {
    ClientOptions options;
    options.timeout_seconds = 20;
    options.channel = channel;
    const auto client = Client::Create(absl::StrCat("127.0.0.1:", port_), options).value();
    return client->OpenSession(v1::OpenSessionRequest()).status().code();
  }

 private:
  FakeSessions fake_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

ChannelOptions Tls(const TlsOptions& options) {
  ChannelOptions channel;
  channel.credentials = TlsCredentials(options).value();
  channel.tls_server_name = "attnd.test";
  return channel;
}

TEST(TlsTest, AClientThatTrustsTheServerIsServed) {
  TlsServer server(/*asks_for_clients=*/false);
  ChannelOptions channel = Tls({.root_certificates = kTestCertificate});
  EXPECT_EQ(server.Open(channel), absl::StatusCode::kOk);
  // The certificate is for another name than the address'.
  channel.tls_server_name = "";
  EXPECT_EQ(server.Open(channel), absl::StatusCode::kUnavailable);
  EXPECT_EQ(server.Open(Tls({})), absl::StatusCode::kUnavailable);
  EXPECT_EQ(server.Open({}), absl::StatusCode::kUnavailable);
}

TEST(TlsTest, AServerThatAsksForACertificateIsShownIt) {
  TlsServer server(/*asks_for_clients=*/true);
  EXPECT_EQ(server.Open(Tls({.root_certificates = kTestCertificate,
                             .certificate_chain = kTestCertificate,
                             .private_key = kTestKey})),
            absl::StatusCode::kOk);
  EXPECT_EQ(server.Open(Tls({.root_certificates = kTestCertificate})),
            absl::StatusCode::kUnavailable);
}

TEST(TlsTest, TextsThatAreNoPemAndHalvesOfAPairAreRefused) {
  for (const TlsOptions& options :
       {TlsOptions{.root_certificates = "/etc/ssl/root.pem"},
        TlsOptions{.certificate_chain = kTestCertificate}, TlsOptions{.private_key = kTestKey},
        TlsOptions{.certificate_chain = "c", .private_key = "k"}}) {
    EXPECT_EQ(TlsCredentials(options).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_TRUE(TlsCredentials({}).ok());
}

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

// Passes one connection on to a server, until it is frozen: then it takes bytes and passes nothing
// on, as a network that has lost its peer without a word.
class Wire {
 public:
  explicit Wire(int server_port) : listener_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = Loopback(0);
    socklen_t size = sizeof(address);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(listener_, 1), 0);
    EXPECT_EQ(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size), 0);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this, server_port] { Pass(server_port); });
  }
  ~Wire() {
    // Both ends of the copying threads' reads.
    shutdown(client_, SHUT_RDWR);
    shutdown(server_, SHUT_RDWR);
    thread_.join();
    for (const int end : {listener_, client_.load(), server_.load()}) close(end);
  }
  int port() const { return port_; }
  void Freeze() { frozen_ = true; }

 private:
  void Pass(int server_port) {
    client_ = accept(listener_, nullptr, nullptr);
    const sockaddr_in address = Loopback(server_port);
    server_ = socket(AF_INET, SOCK_STREAM, 0);
    EXPECT_EQ(connect(server_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    std::thread back([this] { Copy(server_, client_); });
    Copy(client_, server_);
    back.join();
  }
  void Copy(int from, int to) {
    char bytes[4096];
    ssize_t count = 0;
    while ((count = read(from, bytes, sizeof(bytes))) > 0) {
      if (frozen_) continue;
      if (send(to, bytes, static_cast<size_t>(count), MSG_NOSIGNAL) != count) break;
    }
    shutdown(to, SHUT_RDWR);
  }

  int listener_ = -1, port_ = 0;
  std::atomic<int> client_ = -1, server_ = -1;
  std::atomic<bool> frozen_ = false;
  std::thread thread_;
};

TEST(KeepaliveTest, APeerThatVanishedIsNoticedBeforeTheDeadline) {
  FakeSessions fake;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&fake);
  const auto server = builder.BuildAndStart();
  Wire wire(port);
  ClientOptions options;
  options.channel.keepalive_seconds = 0.2;
  options.channel.keepalive_timeout_seconds = 0.2;
  const auto client = Client::Create(absl::StrCat("127.0.0.1:", wire.port()), options).value();
  EXPECT_TRUE(client->OpenSession(v1::OpenSessionRequest()).ok());
  wire.Freeze();
  // Without keepalive it would be DEADLINE_EXCEEDED, after a minute.
  EXPECT_EQ(client->OpenSession(v1::OpenSessionRequest()).status().code(),
            absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace attn::client
