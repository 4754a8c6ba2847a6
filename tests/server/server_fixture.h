// A server's state and dispatcher without gRPC, and calls on it: what handler tests share.
#pragma once

#include <future>
#include <string>
#include <vector>

#include "attention/v1/admin.pb.h"
#include "attention/v1/attention.pb.h"
#include "server/attention_handlers.h"
#include "server/dispatcher.h"
#include "server/server_state.h"

namespace attn::server {

// Two threads, small limits.
ServerOptions SmallServer();

// A received message, in one piece or in slices of `slice_bytes`, as gRPC delivers large ones.
RequestBytes BytesOf(std::string message, int slice_bytes = -1);

struct Reply {
  absl::Status status;
  std::string bytes;

  template <typename Message>
  Message As() const {
    Message message;
    if (!message.ParseFromString(bytes)) message.Clear();
    return message;
  }
};

// Dispatches and waits for the answer.
Reply Call(Dispatcher& dispatcher, const Rpc& rpc, RequestBytes bytes,
           std::shared_ptr<CallContext> context = std::make_shared<CallContext>());
inline Reply Call(Dispatcher& dispatcher, const Rpc& rpc,
                  const google::protobuf::Message& request) {
  return Call(dispatcher, rpc, BytesOf(request.SerializeAsString()));
}

attention::v1::Tensor MakeTensor(const std::vector<std::int64_t>& shape,
                                 const std::vector<float>& values);
std::vector<float> ValuesOf(const attention::v1::Tensor& tensor);

// Queries, keys and values of [batch, heads, length, dim], seeded.
attention::v1::AttendRequest RandomAttend(unsigned seed, std::int64_t batch = 2,
                                          std::int64_t heads = 4, std::int64_t length = 9,
                                          std::int64_t dim = 16);

// A model without weights: one layer of `heads` heads of `dim`.
attention::v1::ModelSpec SpecOf(const std::string& name, std::uint32_t heads, std::uint32_t dim);

}  // namespace attn::server
