#include "server/stream_codec.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/wire_format_lite.h>

#include <cstring>
#include <utility>

#include "attention/v1/attention.pb.h"
#include "core/error.h"
#include "server/error_codec.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;
using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;
using google::protobuf::io::ZeroCopyInputStream;

// A part of a message, as a message of its own.
class PartStream final : public ZeroCopyInputStream {
 public:
  PartStream(std::unique_ptr<ZeroCopyInputStream> whole, std::int64_t offset, std::int64_t size)
      : whole_(std::move(whole)) {
    if (offset > 0) whole_->Skip(static_cast<int>(offset));
    part_ = std::make_unique<google::protobuf::io::LimitingInputStream>(whole_.get(), size);
  }
  bool Next(const void** data, int* size) override { return part_->Next(data, size); }
  void BackUp(int count) override { part_->BackUp(count); }
  bool Skip(int count) override { return part_->Skip(count); }
  std::int64_t ByteCount() const override { return part_->ByteCount(); }

 private:
  const std::unique_ptr<ZeroCopyInputStream> whole_;
  std::unique_ptr<google::protobuf::io::LimitingInputStream> part_;
};

StreamRequestKind KindOfField(int field) {
  switch (field) {
    case proto::StreamRequest::kForwardFieldNumber:
      return StreamRequestKind::kForward;
    case proto::StreamRequest::kAttendFieldNumber:
      return StreamRequestKind::kAttend;
    case proto::StreamRequest::kOpenFieldNumber:
      return StreamRequestKind::kOpen;
    case proto::StreamRequest::kForkFieldNumber:
      return StreamRequestKind::kFork;
    case proto::StreamRequest::kCloseFieldNumber:
      return StreamRequestKind::kClose;
    default:
      return StreamRequestKind::kNone;
  }
}

int AnswerField(StreamRequestKind kind) {
  switch (kind) {
    case StreamRequestKind::kForward:
      return proto::StreamResponse::kForwardFieldNumber;
    case StreamRequestKind::kAttend:
      return proto::StreamResponse::kAttendFieldNumber;
    case StreamRequestKind::kOpen:
      return proto::StreamResponse::kOpenFieldNumber;
    case StreamRequestKind::kFork:
      return proto::StreamResponse::kForkFieldNumber;
    default:
      return proto::StreamResponse::kCloseFieldNumber;
  }
}

// One field of the envelope; false where the bytes are no message.
bool ReadField(std::uint32_t tag, const RequestBytes& bytes, CodedInputStream& input,
               StreamEnvelope& envelope, int& requests) {
  const int field = WireFormatLite::GetTagFieldNumber(tag);
  const auto type = WireFormatLite::GetTagWireType(tag);
  if (field == proto::StreamRequest::kIdFieldNumber && type == WireFormatLite::WIRETYPE_VARINT) {
    return input.ReadVarint64(&envelope.id);
  }
  if (field == proto::StreamRequest::kTimeoutSecondsFieldNumber &&
      type == WireFormatLite::WIRETYPE_FIXED64) {
    std::uint64_t bits = 0;
    if (!input.ReadLittleEndian64(&bits)) return false;
    std::memcpy(&envelope.timeout_seconds, &bits, sizeof(bits));
    return true;
  }
  if (field == proto::StreamRequest::kCancelFieldNumber &&
      type == WireFormatLite::WIRETYPE_VARINT) {
    ++requests;
    envelope.kind = StreamRequestKind::kCancel;
    return input.ReadVarint64(&envelope.cancel);
  }
  const StreamRequestKind kind = KindOfField(field);
  if (kind == StreamRequestKind::kNone || type != WireFormatLite::WIRETYPE_LENGTH_DELIMITED) {
    return WireFormatLite::SkipField(&input, tag);
  }
  std::uint32_t size = 0;
  if (!input.ReadVarint32(&size)) return false;
  const int offset = input.CurrentPosition();
  if (!input.Skip(static_cast<int>(size))) return false;
  ++requests;
  envelope.kind = kind;
  envelope.request.size = size;
  envelope.request.open = [open = bytes.open, offset, size] {
    return std::make_unique<PartStream>(open(), offset, size);
  };
  return true;
}

void AppendVarintField(int field, std::uint64_t value, std::string& out) {
  std::uint8_t bytes[20];
  std::uint8_t* end = WireFormatLite::WriteUInt64ToArray(field, value, bytes);
  out.append(reinterpret_cast<const char*>(bytes), static_cast<std::size_t>(end - bytes));
}

}  // namespace

StreamEnvelope ReadStreamEnvelope(const RequestBytes& bytes) {
  StreamEnvelope envelope;
  const auto stream = bytes.open();
  CodedInputStream input(stream.get());
  int requests = 0;
  bool whole = true;
  while (whole && static_cast<std::uint64_t>(input.CurrentPosition()) < bytes.size) {
    const std::uint32_t tag = input.ReadTagNoLastTag();
    whole = tag != 0 && ReadField(tag, bytes, input, envelope, requests);
  }
  if (!whole || requests > 1) {
    envelope.status = MakeError(absl::StatusCode::kInvalidArgument, "MALFORMED_MESSAGE",
                                whole ? "a stream's message has more than one request"
                                      : "the bytes are not a message of this rpc's request type");
  } else if (requests == 0) {
    envelope.status = InvalidField("request", "the stream's message has no request");
  } else if (!(envelope.timeout_seconds >= 0.0)) {
    envelope.status = InvalidField("timeout_seconds", "timeout_seconds is negative or no number");
  }
  return envelope;
}

Answer WrapStreamAnswer(std::uint64_t id, StreamRequestKind kind, Answer answer) {
  AnswerPiece head;
  if (id != 0) AppendVarintField(proto::StreamResponse::kIdFieldNumber, id, head.header);
  AppendLengthHeader(AnswerField(kind), answer.bytes(), head.header);
  answer.pieces.insert(answer.pieces.begin(), std::move(head));
  return answer;
}

Answer StreamError(std::uint64_t id, const absl::Status& status) {
  proto::StreamResponse response;
  response.set_id(id);
  *response.mutable_error() = ToErrorMessage(status);
  return EncodeMessage(response);
}

}  // namespace attn::server
