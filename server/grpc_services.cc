#include "server/grpc_services.h"

#include <grpcpp/support/server_callback.h>

#include "attention/v1/admin.grpc.pb.h"
#include "attention/v1/attention.grpc.pb.h"
#include "server/grpc_answer_stream.h"
#include "server/grpc_bytes.h"
#include "server/grpc_status.h"
#include "server/grpc_stream.h"

namespace attn::server {
namespace {

using grpc::ByteBuffer;
using grpc::CallbackServerContext;

// One unary call; deletes itself when gRPC is done with it.
class UnaryCall final : public grpc::ServerUnaryReactor {
 public:
  UnaryCall(Dispatcher& dispatcher, const Rpc& rpc, CallbackServerContext& context,
            const ByteBuffer& request, ByteBuffer& response)
      : call_(std::make_shared<CallContext>(DeadlineOf(context))) {
    dispatcher.Dispatch(rpc, BytesOf(request), call_,
                        [this, &context, &response](absl::Status status, Answer answer) {
                          if (status.ok()) response = ToByteBuffer(std::move(answer));
                          Finish(ToGrpcStatus(status, context));
                        });
  }

  void OnCancel() override { call_->Cancel(); }
  void OnDone() override { delete this; }

 private:
  const std::shared_ptr<CallContext> call_;
};

// The methods of a service differ in their names alone.
#define ATTN_UNARY(method)                                                                    \
  grpc::ServerUnaryReactor* method(CallbackServerContext* context, const ByteBuffer* request, \
                                   ByteBuffer* response) override {                           \
    return new UnaryCall(dispatcher_, rpcs::k##method, *context, *request, *response);        \
  }

using attention::v1::AttentionService;
template <typename Base>
using RawSessions = AttentionService::WithRawCallbackMethod_OpenSession<
    AttentionService::WithRawCallbackMethod_ForkSession<
        AttentionService::WithRawCallbackMethod_GetSession<
            AttentionService::WithRawCallbackMethod_CloseSession<Base>>>>;
template <typename Base>
using RawSharedMemory = AttentionService::WithRawCallbackMethod_RegisterSharedMemory<
    AttentionService::WithRawCallbackMethod_UnregisterSharedMemory<Base>>;
using RawAttentionService = AttentionService::WithRawCallbackMethod_Forward<
    AttentionService::WithRawCallbackMethod_Attend<AttentionService::WithRawCallbackMethod_Stream<
        AttentionService::WithRawCallbackMethod_GetServerInfo<
            RawSessions<RawSharedMemory<AttentionService::Service>>>>>>;

class AttentionServiceImpl final : public RawAttentionService {
 public:
  AttentionServiceImpl(ServerState& state, Dispatcher& dispatcher)
      : state_(state), dispatcher_(dispatcher) {}

  ATTN_UNARY(Forward)
  ATTN_UNARY(Attend)
  ATTN_UNARY(GetServerInfo)
  ATTN_UNARY(OpenSession)
  ATTN_UNARY(ForkSession)
  ATTN_UNARY(GetSession)
  ATTN_UNARY(CloseSession)
  ATTN_UNARY(RegisterSharedMemory)
  ATTN_UNARY(UnregisterSharedMemory)

  grpc::ServerBidiReactor<ByteBuffer, ByteBuffer>* Stream(CallbackServerContext* context) override {
    return NewStreamReactor(state_, dispatcher_, *context);
  }

 private:
  ServerState& state_;
  Dispatcher& dispatcher_;
};

using attention::v1::AdminService;
template <typename Base>
using RawModels = AdminService::WithRawCallbackMethod_ListModels<
    AdminService::WithRawCallbackMethod_LoadModel<AdminService::WithRawCallbackMethod_UnloadModel<
        AdminService::WithRawCallbackMethod_SwitchAttention<Base>>>>;
using RawAdminService = RawModels<AdminService::WithRawCallbackMethod_SelectAttention<
    AdminService::WithRawCallbackMethod_BenchmarkAttention<
        AdminService::WithRawCallbackMethod_ListImplementations<
            AdminService::WithRawCallbackMethod_ListSessions<
                AdminService::WithRawCallbackMethod_GetHardware<AdminService::Service>>>>>>;

class AdminServiceImpl final : public RawAdminService {
 public:
  explicit AdminServiceImpl(Dispatcher& dispatcher) : dispatcher_(dispatcher) {}

  ATTN_UNARY(ListModels)
  ATTN_UNARY(LoadModel)
  ATTN_UNARY(UnloadModel)
  ATTN_UNARY(SwitchAttention)
  ATTN_UNARY(SelectAttention)
  ATTN_UNARY(ListImplementations)
  ATTN_UNARY(ListSessions)
  ATTN_UNARY(GetHardware)

  grpc::ServerWriteReactor<ByteBuffer>* BenchmarkAttention(CallbackServerContext* context,
                                                           const ByteBuffer* request) override {
    return NewAnswerStream(dispatcher_, rpcs::kBenchmarkAttention, *context, *request);
  }

 private:
  Dispatcher& dispatcher_;
};

#undef ATTN_UNARY

}  // namespace

std::unique_ptr<grpc::Service> MakeAttentionService(ServerState& state, Dispatcher& dispatcher) {
  return std::make_unique<AttentionServiceImpl>(state, dispatcher);
}

std::unique_ptr<grpc::Service> MakeAdminService(Dispatcher& dispatcher) {
  return std::make_unique<AdminServiceImpl>(dispatcher);
}

}  // namespace attn::server
