// Envelopes of a stream's messages: what is read without parsing the request inside.
#include "server/stream_codec.h"

#include <google/protobuf/io/zero_copy_stream.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/error.h"
#include "tests/server/server_fixture.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

std::string Contents(const RequestBytes& bytes) {
  std::string contents;
  const auto stream = bytes.open();
  const void* data = nullptr;
  int size = 0;
  while (stream->Next(&data, &size)) {
    contents.append(static_cast<const char*>(data), static_cast<std::size_t>(size));
  }
  return contents;
}

std::string BytesOfAnswer(const Answer& answer) {
  std::string bytes;
  for (const AnswerPiece& piece : answer.pieces) {
    bytes.append(static_cast<const char*>(piece.data()), piece.size());
  }
  return bytes;
}

StreamEnvelope Read(const std::string& bytes, int slice_bytes = -1) {
  return ReadStreamEnvelope(BytesOf(bytes, slice_bytes));
}

proto::StreamRequest AttendMessage() {
  proto::StreamRequest message;
  message.set_id(77);
  message.set_timeout_seconds(1.5);
  message.set_traceparent("00-1-2-03");
  *message.mutable_attend() = RandomAttend(1);
  return message;
}

TEST(StreamCodecTest, FindsTheRequestInsideItsMessageHoweverItIsSliced) {
  const proto::StreamRequest message = AttendMessage();
  const std::string inner = message.attend().SerializeAsString();
  for (const int slice : {-1, 1, 7, 61, 4096}) {
    const StreamEnvelope envelope = Read(message.SerializeAsString(), slice);
    ASSERT_TRUE(envelope.status.ok()) << envelope.status;
    EXPECT_EQ(envelope.id, 77u);
    EXPECT_EQ(envelope.timeout_seconds, 1.5);
    EXPECT_EQ(envelope.kind, StreamRequestKind::kAttend);
    EXPECT_EQ(envelope.request.size, inner.size());
    EXPECT_EQ(Contents(envelope.request), inner);
    EXPECT_EQ(Contents(envelope.request), inner);  // as often as it is opened
  }
}

TEST(StreamCodecTest, KnowsEveryKindOfRequest) {
  proto::StreamRequest message;
  message.set_id(std::numeric_limits<std::uint64_t>::max());
  message.mutable_forward();
  EXPECT_EQ(Read(message.SerializeAsString()).kind, StreamRequestKind::kForward);
  message.mutable_open()->set_model("m");
  const StreamEnvelope open = Read(message.SerializeAsString());
  EXPECT_EQ(open.kind, StreamRequestKind::kOpen);
  EXPECT_EQ(open.id, std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(Contents(open.request), message.open().SerializeAsString());
  message.mutable_fork();
  EXPECT_EQ(Read(message.SerializeAsString()).kind, StreamRequestKind::kFork);
  message.mutable_close();
  EXPECT_EQ(Read(message.SerializeAsString()).kind, StreamRequestKind::kClose);
  message.set_cancel(12);
  const StreamEnvelope cancel = Read(message.SerializeAsString());
  EXPECT_EQ(cancel.kind, StreamRequestKind::kCancel);
  EXPECT_EQ(cancel.cancel, 12u);
}

TEST(StreamCodecTest, AnEmptyRequestIsARequest) {
  proto::StreamRequest message;
  message.mutable_attend();
  const StreamEnvelope envelope = Read(message.SerializeAsString());
  EXPECT_TRUE(envelope.status.ok()) << envelope.status;
  EXPECT_EQ(envelope.request.size, 0u);
  EXPECT_EQ(Contents(envelope.request), "");
}

TEST(StreamCodecTest, MalformedEnvelopesAreRefused) {
  const std::string good = AttendMessage().SerializeAsString();
  for (const std::string& bytes :
       {good.substr(0, good.size() - 1), good.substr(0, good.size() / 2), good.substr(0, 3),
        std::string("\x08"), std::string(64, '\xff'), std::string(1, '\0'),
        good + std::string(1, '\0'),
        std::string("\x2a\xff\xff\xff\xff\x0f", 6),  // attend, 2^32 - 1 bytes
        std::string("\x2a\xff\xff\xff\xff\x07"
                    "ab",
                    8),  // 2^31 - 1
        std::string("\x0c", 1), std::string("\x7b\x7b\x7b", 3)}) {
    const StreamEnvelope envelope = Read(bytes);
    EXPECT_EQ(envelope.status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(ErrorReason(envelope.status), "MALFORMED_MESSAGE");
  }
  EXPECT_EQ(Read(good.substr(0, good.size() - 1)).id, 77u);  // as far as it is known
}

TEST(StreamCodecTest, AMessageHasExactlyOneRequest) {
  proto::StreamRequest message;
  message.set_id(5);
  const StreamEnvelope none = Read(message.SerializeAsString());
  EXPECT_EQ(none.status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorDetailsOf(none.status)["field"], "request");
  EXPECT_EQ(none.id, 5u);
  EXPECT_FALSE(Read("").status.ok());
  message.mutable_open();
  proto::StreamRequest second;
  second.set_cancel(1);
  EXPECT_EQ(Read(message.SerializeAsString() + second.SerializeAsString()).status.code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(Read(message.SerializeAsString() + message.SerializeAsString()).status.ok());
}

TEST(StreamCodecTest, TimeoutsAreNumbersFromZeroOn) {
  proto::StreamRequest message = AttendMessage();
  for (const double bad : {-1.0, -1e-9, std::nan(""), -std::numeric_limits<double>::infinity()}) {
    message.set_timeout_seconds(bad);
    EXPECT_EQ(ErrorDetailsOf(Read(message.SerializeAsString()).status)["field"], "timeout_seconds");
  }
  for (const double good : {1e-9, 1e300, std::numeric_limits<double>::infinity()}) {
    message.set_timeout_seconds(good);
    EXPECT_TRUE(Read(message.SerializeAsString()).status.ok());
  }
}

TEST(StreamCodecTest, UnknownFieldsAreSkipped) {
  const std::string unknown =
      std::string("\xa0\x06\x01", 3) + std::string("\xaa\x06\x02xy", 5);  // fields 100 and 101
  const StreamEnvelope envelope = Read(unknown + AttendMessage().SerializeAsString() + unknown);
  EXPECT_TRUE(envelope.status.ok()) << envelope.status;
  EXPECT_EQ(envelope.id, 77u);
}

TEST(StreamCodecTest, AnswersAreWrappedAroundTheirBytes) {
  proto::ForkSessionResponse response;
  response.add_session_ids("one");
  response.add_session_ids("two");
  for (const std::uint64_t id : {std::uint64_t{0}, std::uint64_t{9}, ~std::uint64_t{0}}) {
    proto::StreamResponse message;
    ASSERT_TRUE(message.ParseFromString(
        BytesOfAnswer(WrapStreamAnswer(id, StreamRequestKind::kFork, EncodeMessage(response)))));
    EXPECT_EQ(message.id(), id);
    EXPECT_EQ(message.fork().session_ids(1), "two");
  }
  const std::pair<StreamRequestKind, proto::StreamResponse::ResponseCase> kinds[] = {
      {StreamRequestKind::kForward, proto::StreamResponse::kForward},
      {StreamRequestKind::kAttend, proto::StreamResponse::kAttend},
      {StreamRequestKind::kOpen, proto::StreamResponse::kOpen},
      {StreamRequestKind::kClose, proto::StreamResponse::kClose}};
  for (const auto& [kind, expected] : kinds) {
    proto::StreamResponse message;
    ASSERT_TRUE(message.ParseFromString(BytesOfAnswer(WrapStreamAnswer(1, kind, Answer()))));
    EXPECT_EQ(message.response_case(), expected);
  }
}

TEST(StreamCodecTest, ErrorsCarryWhatProgramsNeed) {
  absl::Status status = MakeError(absl::StatusCode::kAborted, "LATE_STEP", "late", {{"row", "3"}});
  SetRetryDelay(status, 0.5);
  proto::StreamResponse message;
  ASSERT_TRUE(message.ParseFromString(BytesOfAnswer(StreamError(4, status))));
  EXPECT_EQ(message.id(), 4u);
  EXPECT_EQ(message.error().code(), static_cast<int>(absl::StatusCode::kAborted));
  EXPECT_EQ(message.error().reason(), "LATE_STEP");
  EXPECT_EQ(message.error().details().at("row"), "3");
  EXPECT_EQ(message.error().retry_delay_seconds(), 0.5);
}

}  // namespace
}  // namespace attn::server
