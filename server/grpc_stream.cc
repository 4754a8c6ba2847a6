#include "server/grpc_stream.h"

#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "server/grpc_bytes.h"
#include "server/request_stream.h"

namespace attn::server {
namespace {

using grpc::ByteBuffer;

class StreamReactor final : public grpc::ServerBidiReactor<ByteBuffer, ByteBuffer> {
 public:
  StreamReactor(ServerState& state, Dispatcher& dispatcher, grpc::CallbackServerContext& context)
      : max_unsent_(2 * state.limits().max_stream_requests),
        deadline_(DeadlineOf(context)),
        stream_(std::make_shared<RequestStream>(
            state, dispatcher, deadline_,
            [this](StreamAnswer answer) { Send(std::move(answer)); })) {
    StartRead(&message_);
  }

  void OnReadDone(bool ok) override {
    std::unique_lock lock(mutex_);
    if (ok) {
      ++unanswered_;
      lock.unlock();
      const bool answered = stream_->OnMessage(BytesOf(message_));
      message_.Clear();
      lock.lock();
      if (!answered) --unanswered_;
    }
    if (!ok) {
      ended_ = true;
    } else if (unsent_.size() >= max_unsent_) {
      paused_ = true;  // a caller that does not take its answers gets no more of them
      return;
    } else {
      lock.unlock();
      return StartRead(&message_);
    }
    FinishIfIdle(lock);
  }

  void OnWriteDone(bool ok) override {
    StreamAnswer sent;  // freed outside the lock
    std::deque<StreamAnswer> dropped;
    std::unique_lock lock(mutex_);
    sent = std::move(unsent_.front());
    unsent_.pop_front();
    broken_ = broken_ || !ok;
    if (broken_) {
      dropped.swap(unsent_);
    } else if (!unsent_.empty()) {
      WriteFirst();
    }
    if (paused_ && unsent_.size() < max_unsent_) {
      paused_ = false;
      lock.unlock();
      StartRead(&message_);
      return;
    }
    FinishIfIdle(lock);
  }

  // The caller is gone, or the stream's deadline has passed. Reading ends by itself.
  void OnCancel() override {
    std::unique_lock lock(mutex_);
    broken_ = true;
    status_ = grpc::Status(grpc::StatusCode::CANCELLED, "the stream was cancelled");
    if (std::exchange(paused_, false)) ended_ = true;  // nothing reads any more
    lock.unlock();
    stream_->Cancel();
    lock.lock();
    FinishIfIdle(lock);
  }

  void OnDone() override { delete this; }

 private:
  // Answers come from any thread; one at a time is being written.
  void Send(StreamAnswer answer) {
    std::unique_lock lock(mutex_);
    --unanswered_;
    if (broken_) return FinishIfIdle(lock);
    unsent_.push_back(std::move(answer));
    if (unsent_.size() == 1) WriteFirst();
  }

  void WriteFirst() {
    unsent_.front().share.reset();
    buffer_ = ToByteBuffer(std::move(unsent_.front().answer));
    StartWrite(&buffer_);
  }

  // When nothing more can come and everything has left: then nobody else has a use for this object.
  void FinishIfIdle(std::unique_lock<std::mutex>& lock) {
    if (!ended_ || finished_ || !unsent_.empty() || unanswered_ > 0) return;
    finished_ = true;
    // The last requests' deadlines are the stream's, and may be noticed before it.
    const grpc::Status status =
        Clock::now() < deadline_
            ? status_
            : grpc::Status(grpc::StatusCode::DEADLINE_EXCEEDED, "the deadline has passed");
    lock.unlock();
    Finish(status);
  }

  const std::size_t max_unsent_;
  const Clock::time_point deadline_;
  ByteBuffer message_;
  ByteBuffer buffer_;  // that is being written

  std::mutex mutex_;
  std::deque<StreamAnswer> unsent_;
  std::size_t unanswered_ = 0;  // messages whose answers Send has not got
  bool paused_ = false;         // reading
  bool ended_ = false;          // nothing more is read
  bool broken_ = false;         // nothing more can be written
  bool finished_ = false;
  grpc::Status status_;
  const std::shared_ptr<RequestStream> stream_;
};

}  // namespace

grpc::ServerBidiReactor<ByteBuffer, ByteBuffer>* NewStreamReactor(
    ServerState& state, Dispatcher& dispatcher, grpc::CallbackServerContext& context) {
  return new StreamReactor(state, dispatcher, context);
}

}  // namespace attn::server
