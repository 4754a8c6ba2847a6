// The client against a server in this process whose handlers do what each test says.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "attention/v1/admin.grpc.pb.h"
#include "attention/v1/attention.grpc.pb.h"
#include "client/cpp/attnd_client.h"
#include "client/cpp/tensors.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;

class FakeAttention : public v1::AttentionService::Service {
 public:
  using Handler = std::function<grpc::Status(grpc::ServerContext&, const v1::AttendRequest&,
                                             v1::AttendResponse&)>;

  grpc::Status Attend(grpc::ServerContext* context, const v1::AttendRequest* request,
                      v1::AttendResponse* response) override {
    return attend(*context, *request, *response);
  }
  grpc::Status GetServerInfo(grpc::ServerContext*, const v1::GetServerInfoRequest*,
                             v1::GetServerInfoResponse* response) override {
    response->set_version("1.2.3");
    return grpc::Status::OK;
  }

  Handler attend;
};

class FakeAdmin : public v1::AdminService::Service {
 public:
  grpc::Status ListModels(grpc::ServerContext*, const v1::ListModelsRequest*,
                          v1::ListModelsResponse* response) override {
    response->add_models()->mutable_spec()->set_name("minilm");
    return grpc::Status::OK;
  }
  grpc::Status ListSessions(grpc::ServerContext*, const v1::ListSessionsRequest* request,
                            v1::ListSessionsResponse* response) override {
    const int page = request->page_token().empty() ? 0 : std::stoi(request->page_token());
    response->add_sessions()->set_id_prefix(absl::StrCat(request->model(), page));
    if (page < last_page) response->set_next_page_token(absl::StrCat(page + 1));
    if (stuck) response->set_next_page_token("1");
    return grpc::Status::OK;
  }
  grpc::Status SwitchAttention(grpc::ServerContext*, const v1::SwitchAttentionRequest* request,
                               v1::SwitchAttentionResponse* response) override {
    response->set_switched(true);
    response->set_active(absl::StrCat(request->model(), "/", request->implementation()));
    return grpc::Status::OK;
  }

  int last_page = 0;
  bool stuck = false;
};

grpc::Status Fail(grpc::ServerContext& context, grpc::StatusCode code, const v1::Error& error) {
  context.AddTrailingMetadata("attention-error-bin", error.SerializeAsString());
  return grpc::Status(code, error.message());
}

class ClientTest : public testing::Test {
 protected:
  ClientTest() {
    std::string pattern = (std::filesystem::temp_directory_path() / "client_test.XXXXXX").string();
    folder_ = mkdtemp(pattern.data());
    socket_ = absl::StrCat("unix:", folder_, "/s");
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.AddListeningPort(socket_, grpc::InsecureServerCredentials());
    builder.RegisterService(&attention_);
    builder.RegisterService(&admin_);
    server_ = builder.BuildAndStart();
    address_ = absl::StrCat("127.0.0.1:", port);
  }
  ~ClientTest() override {
    server_->Shutdown();
    std::filesystem::remove_all(folder_);
  }

  std::unique_ptr<Client> Connect(const ClientOptions& options = {}) const {
    return Client::Create(address_, options).value();
  }

  std::string folder_, socket_, address_;
  FakeAttention attention_;
  FakeAdmin admin_;
  std::unique_ptr<grpc::Server> server_;
};

TEST_F(ClientTest, AttendsOverTcpAndAUnixSocket) {
  attention_.attend = [](grpc::ServerContext&, const v1::AttendRequest& request,
                         v1::AttendResponse& response) {
    *response.mutable_output() = request.query();
    response.mutable_execution()->set_implementation(request.execution().implementation());
    return grpc::Status::OK;
  };
  v1::AttendRequest request;
  *request.mutable_query() = FloatTensor({1, 1, 1, 2}, {3, 4});
  request.mutable_execution()->set_implementation("flash");
  for (const std::string& address : {address_, socket_}) {
    const auto client = Client::Create(address).value();
    const auto response = client->Attend(request);
    ASSERT_TRUE(response.ok()) << response.status();
    EXPECT_EQ(response->output().data(), request.query().data());
    EXPECT_EQ(response->execution().implementation(), "flash");
    EXPECT_EQ(client->address(), address);
  }
}

TEST_F(ClientTest, ReachesBothServices) {
  const auto client = Connect();
  EXPECT_EQ(client->GetServerInfo().value().version(), "1.2.3");
  EXPECT_EQ(client->ListModels().value().models(0).spec().name(), "minilm");
  v1::SwitchAttentionRequest request;
  request.set_model("minilm");
  request.set_implementation("standard");
  EXPECT_EQ(client->SwitchAttention(request).value().active(), "minilm/standard");
}

TEST_F(ClientTest, SessionsAreListedOverAllPages) {
  const auto client = Connect();
  admin_.last_page = 2;
  const auto all = client->ListAllSessions("m").value();
  ASSERT_EQ(all.sessions_size(), 3);
  EXPECT_EQ(all.sessions(2).id_prefix(), "m2");
  EXPECT_EQ(all.next_page_token(), "");
  admin_.stuck = true;
  EXPECT_EQ(client->ListAllSessions("m").status().code(), absl::StatusCode::kInternal);
}

TEST_F(ClientTest, ErrorsCarryWhatTheServerToldPrograms) {
  attention_.attend = [](grpc::ServerContext& context, const v1::AttendRequest&,
                         v1::AttendResponse&) {
    v1::Error error;
    error.set_code(grpc::StatusCode::RESOURCE_EXHAUSTED);
    error.set_message("the queue is full");
    error.set_reason("QUEUE_FULL");
    error.set_retry_delay_seconds(0.25);
    (*error.mutable_details())["queued"] = "64";
    // Not text: the metadata is binary on the wire too.
    (*error.mutable_details())["field"] = std::string("qu\xc3\xa9ry\0", 7);
    return Fail(context, grpc::StatusCode::RESOURCE_EXHAUSTED, error);
  };
  const auto response = Connect()->Attend({});
  ASSERT_FALSE(response.ok());
  EXPECT_EQ(response.status().code(), absl::StatusCode::kResourceExhausted);
  const ClientError error = ErrorOf(response.status());
  EXPECT_EQ(error.code, absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(error.message, "the queue is full");
  EXPECT_EQ(error.reason, "QUEUE_FULL");
  EXPECT_EQ(error.retry_delay_seconds, 0.25);
  ASSERT_EQ(error.details.size(), 2u);
  EXPECT_TRUE(error.answered);
  EXPECT_EQ(error.details.at("queued"), "64");
  EXPECT_EQ(error.details.at("field").size(), 7u);
}

TEST_F(ClientTest, AnErrorWithoutOrWithBrokenDetailsIsStillAnError) {
  bool broken = false;
  attention_.attend = [&broken](grpc::ServerContext& context, const v1::AttendRequest&,
                                v1::AttendResponse&) {
    if (broken) context.AddTrailingMetadata("attention-error-bin", "\xff\xff\xff");
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "no model 'x'");
  };
  const auto client = Connect();
  for (const bool value : {false, true}) {
    broken = value;
    const ClientError error = ErrorOf(client->Attend({}).status());
    EXPECT_EQ(error.code, absl::StatusCode::kNotFound);
    EXPECT_EQ(error.message, "no model 'x'");
    EXPECT_EQ(error.reason, "");
    EXPECT_FALSE(error.answered);
    EXPECT_TRUE(error.details.empty());
  }
}

// How long a handler holds back an answer that should not be needed: then the test fails, and ends.
constexpr absl::Duration kTooLong = absl::Seconds(20);

// The handler waits until the client has its answer, so that only the deadline can give one.
TEST_F(ClientTest, ADeadlineEndsTheCall) {
  absl::Notification answered;
  std::chrono::system_clock::time_point deadline;
  attention_.attend = [&](grpc::ServerContext& context, const v1::AttendRequest&,
                          v1::AttendResponse&) {
    deadline = context.deadline();
    answered.WaitForNotificationWithTimeout(kTooLong);
    return grpc::Status::OK;
  };
  const auto started = std::chrono::system_clock::now();
  ClientOptions options;
  options.timeout_seconds = 0.2;
  const auto response = Connect(options)->Attend({});
  answered.Notify();
  EXPECT_EQ(response.status().code(), absl::StatusCode::kDeadlineExceeded);
  server_->Shutdown();  // the handler has returned: what it wrote may be read
  EXPECT_LT(deadline - started, std::chrono::seconds(1));
}

TEST_F(ClientTest, ACallsOwnTimeoutGoesOverTheClients) {
  std::chrono::system_clock::time_point deadline;
  attention_.attend = [&](grpc::ServerContext& context, const v1::AttendRequest&,
                          v1::AttendResponse&) {
    deadline = context.deadline();
    return grpc::Status::OK;
  };
  EXPECT_TRUE(Connect()->Attend({}, {.timeout_seconds = 3600}).ok());
  EXPECT_GT(deadline - std::chrono::system_clock::now(), std::chrono::minutes(50));
  EXPECT_TRUE(Connect()->Attend({}, {.timeout_seconds = 0}).ok());
  EXPECT_GT(deadline - std::chrono::system_clock::now(), std::chrono::hours(24 * 300));
}

TEST_F(ClientTest, NoTimeoutIsNoDeadline) {
  std::chrono::system_clock::time_point deadline;
  attention_.attend = [&](grpc::ServerContext& context, const v1::AttendRequest&,
                          v1::AttendResponse&) {
    deadline = context.deadline();
    return grpc::Status::OK;
  };
  ClientOptions options;
  for (const double seconds : {0.0, 1e300}) {
    options.timeout_seconds = seconds;
    EXPECT_TRUE(Connect(options)->Attend({}).ok());
    EXPECT_GT(deadline - std::chrono::system_clock::now(), std::chrono::hours(24 * 300));
  }
}

TEST_F(ClientTest, AnotherThreadCancelsACall) {
  absl::Notification entered, answered;
  attention_.attend = [&](grpc::ServerContext&, const v1::AttendRequest&, v1::AttendResponse&) {
    entered.Notify();
    answered.WaitForNotificationWithTimeout(kTooLong);
    return grpc::Status::OK;
  };
  const auto client = Connect();
  EXPECT_EQ(client->CancelCalls(), 0);
  int cancelled = 0;
  std::thread canceller([&] {
    entered.WaitForNotification();
    cancelled = client->CancelCalls();
  });
  const auto response = client->Attend({});
  answered.Notify();
  canceller.join();
  EXPECT_EQ(response.status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(cancelled, 1);
  EXPECT_EQ(client->CancelCalls(), 0);
  EXPECT_TRUE(client->GetServerInfo().ok());
}

TEST_F(ClientTest, MessageLimitsHoldInBothDirections) {
  int calls = 0;
  attention_.attend = [&calls](grpc::ServerContext&, const v1::AttendRequest&,
                               v1::AttendResponse& response) {
    ++calls;
    response.mutable_output()->set_data(std::string(5000, 'x'));
    return grpc::Status::OK;
  };
  ClientOptions options;
  options.max_message_bytes = 4096;
  const auto client = Connect(options);
  v1::AttendRequest request;
  request.mutable_query()->set_data(std::string(5000, 'x'));
  EXPECT_EQ(client->Attend(request).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(calls, 0);
  EXPECT_EQ(client->Attend({}).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(Connect()->Attend(request).ok());
}

TEST_F(ClientTest, AServerThatIsNotThereIsNamed) {
  server_->Shutdown();
  const auto response = Connect()->GetServerInfo();
  EXPECT_EQ(response.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ErrorOf(response.status()).reason, "");
  EXPECT_NE(response.status().message().find(absl::StrCat("from ", address_)), std::string::npos);
}

TEST(CheckAddressTest, TakesHostAndPortOrASocket) {
  for (const char* good :
       {"127.0.0.1:7700", "localhost:1", "[::1]:7700", "unix:/tmp/s", "unix:s"}) {
    EXPECT_TRUE(CheckAddress(good).ok()) << good;
  }
  for (const char* bad : {"", "localhost", "localhost:", ":7700", "localhost:0", "localhost:65536",
                          "localhost:http", "::1:7700", "unix:"}) {
    EXPECT_EQ(CheckAddress(bad).code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_FALSE(Client::Create(bad).ok()) << bad;
  }
}

TEST(ErrorOfTest, AStatusOfTheCallersOwnHasNoReason) {
  const ClientError error = ErrorOf(absl::NotFoundError("q.npy: no such file"));
  EXPECT_EQ(error.code, absl::StatusCode::kNotFound);
  EXPECT_EQ(error.reason, "");
  EXPECT_EQ(ErrorOf(absl::OkStatus()).code, absl::StatusCode::kOk);
}

}  // namespace
}  // namespace attn::client
