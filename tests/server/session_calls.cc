#include "tests/server/session_calls.h"

#include <gtest/gtest.h>

#include <cmath>

namespace attn::server {
namespace {

namespace proto = attention::v1;

constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kDim = 8;

// [batch, heads, length, dim] tensors end to end along the length.
proto::Tensor Concatenate(const std::vector<const proto::Tensor*>& parts) {
  const std::int64_t rows = parts[0]->shape(0) * parts[0]->shape(1);
  std::int64_t length = 0;
  for (const proto::Tensor* part : parts) length += part->shape(2);
  std::vector<float> values;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (const proto::Tensor* part : parts) {
      const std::vector<float> from = ValuesOf(*part);
      const std::int64_t count = part->shape(2) * part->shape(3);
      values.insert(values.end(), from.begin() + row * count, from.begin() + (row + 1) * count);
    }
  }
  return MakeTensor({parts[0]->shape(0), parts[0]->shape(1), length, parts[0]->shape(3)}, values);
}

}  // namespace

std::future<Reply> CallLater(Dispatcher& dispatcher, const Rpc& rpc,
                             const google::protobuf::Message& request,
                             std::shared_ptr<CallContext> context) {
  const auto answered = std::make_shared<std::promise<Reply>>();
  std::future<Reply> reply = answered->get_future();
  dispatcher.Dispatch(rpc, BytesOf(request.SerializeAsString()), std::move(context),
                      [answered](absl::Status status, const Answer& answer) {
                        Reply made{std::move(status), {}};
                        for (const AnswerPiece& piece : answer.pieces) {
                          made.bytes.append(static_cast<const char*>(piece.data()), piece.size());
                        }
                        answered->set_value(std::move(made));
                      });
  return reply;
}

std::string OpenSession(Dispatcher& dispatcher, const std::string& model) {
  proto::OpenSessionRequest request;
  request.set_model(model);
  const Reply reply = Call(dispatcher, rpcs::kOpenSession, request);
  EXPECT_TRUE(reply.status.ok()) << reply.status;
  return reply.As<proto::OpenSessionResponse>().session_id();
}

proto::AttendRequest SessionAttend(const std::vector<std::string>& ids, unsigned seed,
                                   std::int64_t tokens) {
  proto::AttendRequest request = RandomAttend(seed, std::ssize(ids), kHeads, tokens, kDim);
  request.mutable_options()->set_is_causal(true);
  for (const std::string& id : ids) {
    request.mutable_past_key_value()->mutable_sessions()->add_session_ids(id);
  }
  return request;
}

proto::AttendRequest WithoutSessions(const std::vector<proto::AttendRequest>& earlier,
                                     const proto::AttendRequest& request) {
  proto::AttendRequest whole = request;
  whole.clear_past_key_value();
  std::vector<const proto::Tensor*> keys;
  std::vector<const proto::Tensor*> values;
  for (const proto::AttendRequest& one : earlier) {
    keys.push_back(&one.key());
    values.push_back(&one.value());
  }
  keys.push_back(&request.key());
  values.push_back(&request.value());
  *whole.mutable_key() = Concatenate(keys);
  *whole.mutable_value() = Concatenate(values);
  return whole;
}

DeviceBlock::DeviceBlock(ServerState& state) {
  const auto blocked = std::make_shared<std::promise<void>>();
  const absl::Status pushed =
      state.queues().front()->Push({std::make_shared<CallContext>(), 0,
                                    [blocked, wait = release_.get_future().share()] {
                                      blocked->set_value();
                                      wait.wait();
                                    },
                                    [](absl::Status) {}});
  EXPECT_TRUE(pushed.ok());
  blocked->get_future().wait();
}

void DeviceBlock::Release() {
  if (!released_) release_.set_value();
  released_ = true;
}

bool AllClose(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) < 1e-5f)) return false;
  }
  return true;
}

}  // namespace attn::server
