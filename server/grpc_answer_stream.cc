#include "server/grpc_answer_stream.h"

#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "server/grpc_bytes.h"
#include "server/grpc_status.h"

namespace attn::server {
namespace {

using grpc::ByteBuffer;

class AnswerStream final : public grpc::ServerWriteReactor<ByteBuffer> {
 public:
  AnswerStream(Dispatcher& dispatcher, const Rpc& rpc, grpc::CallbackServerContext& context,
               const ByteBuffer& request)
      : context_(context), call_(std::make_shared<CallContext>(DeadlineOf(context))) {
    call_->send = [this](Answer answer, bool needed) { Send(std::move(answer), needed); };
    dispatcher.Dispatch(rpc, BytesOf(request), call_,
                        [this](absl::Status status, const Answer&) { End(std::move(status)); });
  }

  void OnWriteDone(bool ok) override {
    std::unique_lock lock(mutex_);
    unsent_.pop_front();
    broken_ = broken_ || !ok;
    if (broken_) unsent_.clear();
    if (!unsent_.empty()) return WriteFirst();
    FinishIfDone(lock);
  }

  void OnCancel() override { call_->Cancel(); }
  void OnDone() override { delete this; }

 private:
  // From any thread, before End. A caller that does not read misses what is not needed.
  void Send(Answer answer, bool needed) {
    std::lock_guard lock(mutex_);
    if (broken_ || (!needed && !unsent_.empty())) return;
    unsent_.push_back(std::move(answer));
    if (unsent_.size() == 1) WriteFirst();
  }

  void End(absl::Status status) {
    std::unique_lock lock(mutex_);
    ended_ = true;
    status_ = std::move(status);
    FinishIfDone(lock);
  }

  void WriteFirst() {
    buffer_ = ToByteBuffer(std::move(unsent_.front()));
    StartWrite(&buffer_);
  }

  // After that nobody has a use for this object.
  void FinishIfDone(std::unique_lock<std::mutex>& lock) {
    if (!ended_ || !unsent_.empty()) return;
    lock.unlock();
    Finish(ToGrpcStatus(status_, context_));
  }

  grpc::CallbackServerContext& context_;
  const std::shared_ptr<CallContext> call_;
  std::mutex mutex_;
  std::deque<Answer> unsent_;  // the first one is being written
  ByteBuffer buffer_;
  bool broken_ = false;  // nothing more can be written
  bool ended_ = false;
  absl::Status status_;
};

}  // namespace

grpc::ServerWriteReactor<ByteBuffer>* NewAnswerStream(Dispatcher& dispatcher, const Rpc& rpc,
                                                      grpc::CallbackServerContext& context,
                                                      const ByteBuffer& request) {
  return new AnswerStream(dispatcher, rpc, context, request);
}

}  // namespace attn::server
