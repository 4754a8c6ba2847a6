#include "tests/server/server_fixture.h"

#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <cstring>
#include <random>

#include "tests/core/core_fixture.h"

namespace attn::server {

ServerOptions SmallServer() {
  ServerOptions options;
  options.cpu = TestExecutor(2);
  options.limits.max_message_bytes = std::uint64_t{1} << 20;
  options.limits.max_inflight_bytes = std::uint64_t{64} << 20;
  options.limits.max_tokens = 1 << 16;
  options.limits.queue_capacity = 64;
  return options;
}

RequestBytes BytesOf(std::string message, int slice_bytes) {
  const auto held = std::make_shared<const std::string>(std::move(message));
  return {held->size(), [held, slice_bytes] {
            return std::make_unique<google::protobuf::io::ArrayInputStream>(
                held->data(), static_cast<int>(held->size()), slice_bytes);
          }};
}

Reply Call(Dispatcher& dispatcher, const Rpc& rpc, RequestBytes bytes,
           std::shared_ptr<CallContext> context) {
  std::promise<Reply> answered;
  dispatcher.Dispatch(rpc, std::move(bytes), std::move(context),
                      [&](absl::Status status, const Answer& answer) {
                        Reply reply{std::move(status), {}};
                        for (const AnswerPiece& piece : answer.pieces) {
                          reply.bytes.append(static_cast<const char*>(piece.data()), piece.size());
                        }
                        answered.set_value(std::move(reply));
                      });
  return answered.get_future().get();
}

attention::v1::Tensor MakeTensor(const std::vector<std::int64_t>& shape,
                                 const std::vector<float>& values) {
  attention::v1::Tensor tensor;
  tensor.set_dtype(attention::v1::DATA_TYPE_FLOAT32);
  for (std::int64_t extent : shape) tensor.add_shape(extent);
  tensor.set_data(values.data(), values.size() * sizeof(float));
  return tensor;
}

std::vector<float> ValuesOf(const attention::v1::Tensor& tensor) {
  std::vector<float> values(tensor.data().size() / sizeof(float));
  std::memcpy(values.data(), tensor.data().data(), values.size() * sizeof(float));
  return values;
}

attention::v1::AttendRequest RandomAttend(unsigned seed, std::int64_t batch, std::int64_t heads,
                                          std::int64_t length, std::int64_t dim) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const auto tensor = [&] {
    std::vector<float> values(static_cast<std::size_t>(batch * heads * length * dim));
    for (float& value : values) value = normal(random);
    return MakeTensor({batch, heads, length, dim}, values);
  };
  attention::v1::AttendRequest request;
  *request.mutable_query() = tensor();
  *request.mutable_key() = tensor();
  *request.mutable_value() = tensor();
  return request;
}

attention::v1::ModelSpec SpecOf(const std::string& name, std::uint32_t heads, std::uint32_t dim) {
  attention::v1::ModelSpec spec;
  spec.set_name(name);
  attention::v1::LayerSpec& layer = *spec.add_stacks()->add_self_attention();
  layer.set_num_heads(heads);
  layer.set_head_dim(dim);
  return spec;
}

}  // namespace attn::server
